"""The benchmark of secure sums measures what it says, on a small cohort."""

import pytest

from umbel.benchmarks.speed import secure


def test_every_figure_is_there_and_the_primitives_beat_flower() -> None:
    found = secure.measure(nodes=7, size=20_000, repeats=3, losses=1)
    for name in ("client_masking_s", "client_s", "server_s", "server_with_losses_s"):
        assert found[name] > 0
    assert found["wire_over_bits"] <= 1.01
    assert found["wire_bytes"] > 20_000 * 20 / 8
    assert found["shamir_split_s"] < found["flower_shamir_split_s"]
    assert set(found["reached"]) == set(secure.TARGETS)


def test_a_secure_round_of_the_link_is_held_against_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seconds say how fast a machine is; the ratio says what five trips cost."""
    small = secure.measure(nodes=7, size=10_000, repeats=2, losses=1)
    times = {"link_round_s": 0.09, "link_plain_round_s": 0.01, "link_bare_round_s": 0.005}
    link = {**times, "link_over_plain": 9.0, "link_nodes": 10}
    monkeypatch.setattr(secure, "measure", lambda: dict(small))
    monkeypatch.setattr(secure, "measure_link", lambda: link)
    made = {figure.what: figure for figure in secure.figures()}
    ratio = made["link: secure over plain round"]
    assert (ratio.value, ratio.target, ratio.met) == (9.0, 8.0, False)
    assert made["link: round of 10 nodes"].target is None


def test_quick_figures_have_no_targets_to_miss() -> None:
    made = secure.figures(quick=True)
    assert {figure.part for figure in made} == {"secure"}
    assert all(figure.target is None and figure.value > 0 for figure in made)
