"""The benchmark of secure sums measures what it says, on a small cohort."""

from umbel.benchmarks.speed import secure


def test_every_figure_is_there_and_the_primitives_beat_flower() -> None:
    found = secure.measure(nodes=7, size=20_000, repeats=3, losses=1)
    for name in ("client_masking_s", "client_s", "server_s", "server_with_losses_s"):
        assert found[name] > 0
    assert found["wire_over_bits"] <= 1.01
    assert found["wire_bytes"] > 20_000 * 20 / 8
    assert found["shamir_split_s"] < found["flower_shamir_split_s"]
    assert set(found["reached"]) == set(secure.TARGETS)


def test_quick_figures_have_no_targets_to_miss() -> None:
    made = secure.figures(quick=True)
    assert {figure.part for figure in made} == {"secure"}
    assert all(figure.target is None and figure.value > 0 for figure in made)
