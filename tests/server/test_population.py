"""The same people under another directory, name or file are not taken for new ones."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, TruncatedSubsampledGaussianDpEvent, ZCDpEvent

from tests.server.test_private_means import Blobs
from tests.server.test_private_run import Lab, certificate, ledger_of
from umbel import Dirichlet, FeatureMap, Partitioned, PrecomputedFeatures
from umbel.core.errors import CheckError, ConfigError
from umbel.privacy.budget.accounting import poisson, spent
from umbel.privacy.budget.events import REPLACE, ZERO_OUT, Charge
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.budget import in_total
from umbel.server.private.coordinator_key import data_folder
from umbel.server.private.ledger import Ledger, entries
from umbel.server.private.population import declaration, name_of
from umbel.server.private.verify import charges_in, verify


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    monkeypatch.setenv("UMBEL_CACHE", str(tmp_path / "cache"))
    return Blobs(tmp_path)


def only_ledger() -> Path:
    """The one ledger that there is."""
    (found,) = (data_folder() / "populations").glob("*.sqlite")
    return found


# ---- whose data it is


def test_the_data_name_the_population_and_not_how_they_are_divided() -> None:
    def of(data: object) -> str:
        return name_of("app", data)

    one = of(Partitioned("digits", Dirichlet(0.5)))
    assert one.startswith("app.digits-")
    assert one == of(Partitioned("digits", seed=3, test_fraction=0.2)) == of("digits")
    assert one == of(PrecomputedFeatures("digits", FeatureMap("pixels", 64, lambda rows: rows)))
    assert one != of(Partitioned("wine"))
    assert one != name_of("other-app", Partitioned("digits"))
    assert declaration(ledger_of) == declaration(functools.partial(ledger_of, "x"))
    assert name_of("an app / with $igns", "x" * 99).count("/") == 0


def test_a_fresh_directory_is_no_fresh_population(lab: Lab) -> None:
    first = lab.run("one", epsilon=3.0)
    second = lab.run("two", epsilon=3.0)
    assert first["epsilon"] == pytest.approx(second["epsilon"]) and first["epsilon"] <= 3
    assert first["epsilon_in_total"]["model-user"] == pytest.approx(first["epsilon"], abs=0.01)
    total = spent(charges_in(entries(only_ledger()))["model-user"], 1e-5).epsilon
    assert total > first["epsilon"]
    assert second["epsilon_in_total"]["model-user"] == pytest.approx(total, abs=0.01)
    assert certificate(lab, "two")["scope"] == "run"
    assert any("was spent before on the same data" in line for line in lab.heard.lines)
    card = (lab.directory("two").path / "MODEL_CARD.md").read_text()
    assert "this run alone" in card and f"comes to epsilon {total:.3g}"[:-1] in card
    assert verify(lab.directory("one").path) == verify(lab.directory("two").path) == []


def test_the_population_is_found_from_another_folder(lab: Lab, tmp_path: Path) -> None:
    lab.run("one", epsilon=2.0, population="people")
    elsewhere = Lab(tmp_path / "moved")  # another copy of the app, other run directories
    with pytest.raises(ConfigError, match="is spent"):
        elsewhere.run("two", epsilon=2.0, population="people")
    assert ledger_of().is_file()


@pytest.mark.parametrize("other", ["population", "ledger"])
def test_a_second_name_for_the_same_nodes_is_seen(lab: Lab, tmp_path: Path, other: str) -> None:
    lab.run("one", epsilon=2.0, population="people")
    assert certificate(lab, "one")["elsewhere"] == []
    new = {"population": "b"} if other == "population" else {"ledger": str(tmp_path / "b.sqlite")}
    lab.run("two", epsilon=2.0, **new)
    (seen,) = certificate(lab, "two")["elsewhere"]
    assert (seen["population"], seen["nodes"]) == ("people", 20)
    said = "20 of the 20 nodes are in another ledger on this machine too"
    assert any(said in line and "'people'" in line for line in lab.heard.lines)
    assert "population 'people'" in (lab.directory("two").path / "MODEL_CARD.md").read_text()
    assert verify(lab.directory("two").path) == []


def test_a_ledger_that_was_set_back_is_refused(lab: Lab) -> None:
    lab.run("one", epsilon=2.0, population="people")
    kept = ledger_of().read_bytes()
    lab.run("two", epsilon=4.0, population="people")
    ledger_of().write_bytes(kept)
    with pytest.raises(CheckError, match="set back to an earlier copy"):
        lab.run("three", epsilon=6.0, population="people")


def test_a_ledger_that_somebody_else_wrote_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.pem"
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "forger.pem"))
    with Ledger(tmp_path / "people.sqlite", "people"):
        pass
    monkeypatch.setenv("UMBEL_KEY", str(mine))
    with pytest.raises(ConfigError, match="not signed with this coordinator's key"):
        lab.run(epsilon=2.0, population="people", ledger=str(tmp_path / "people.sqlite"))


def test_a_long_history_of_unlike_releases_is_added_up_all_the_same() -> None:
    few = Counter({Charge(poisson(2.0 + i / 100, 0.1)): 2 for i in range(8)})
    many = few + Counter({Charge(poisson(3.0 + i / 100, 0.1)): 2 for i in range(40)})
    assert in_total(Counter(), few, "model-user", 1e-5).epsilon > 0
    result = in_total(Counter(), many, "model-user", 1e-5)
    assert result.epsilon == pytest.approx(spent(many, 1e-5, accountant="rdp").epsilon)
    truncated = Charge(TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 9.0))
    assert in_total(Counter(), many + Counter([truncated]), "model-user", 1e-5).epsilon < 60
    # no proof adds noise of many nodes to what holds for replaced data
    seen = Counter([Charge(ZCDpEvent(0.01), ZERO_OUT), Charge(GaussianDpEvent(4.0), REPLACE)])
    assert in_total(seen, Counter(), "server", 1e-5).epsilon == float("inf")


def test_kinds_that_nothing_adds_up_are_not_mixed_in_one_budget(lab: Lab) -> None:
    lab.run("one", epsilon=8.0, mechanism="local", population="people", rounds=1)
    with pytest.raises(ConfigError, match="cannot be added up"):
        lab.run(
            "two", epsilon=9.0, secure=True, noise_multiplier=4.0, population="people", rounds=1
        )


# ---- releases without noise


def test_what_was_protected_stays_so_unless_somebody_says_otherwise(lab: Lab) -> None:
    assert lab.run("free")["epsilon"] is None  # nothing was promised yet
    lab.run("one", epsilon=2.0, population="people")
    before = entries(only_ledger())
    with pytest.raises(ConfigError, match="--unprotected"):
        lab.run("two", population="people")
    assert entries(only_ledger()) == before
    assert lab.run("three", population="people", unprotected=True)["epsilon"] is None


def test_simulations_may_go_on_without_noise_and_their_ledger_says_so(lab: Lab) -> None:
    lab.run("one", epsilon=2.0)
    assert lab.run("two")["epsilon"] is None
    assert any("epsilon infinite from now on" in line for line in lab.heard.lines)
    after = lab.run("four", epsilon=2.0)
    assert after["epsilon"] <= 2
    assert after["epsilon_in_total"]["model-user"] == float("inf")
    assert "comes to epsilon infinite" in (lab.directory("four").path / "MODEL_CARD.md").read_text()
    assert verify(lab.directory("four").path) == []
    lab.run("five")  # there is nothing left to break


def test_a_named_population_that_was_left_unprotected_has_no_budget(lab: Lab) -> None:
    lab.run("one", epsilon=2.0, population="people")
    lab.run("two", population="people", unprotected=True)
    with pytest.raises(ConfigError, match="is spent"):
        lab.run("three", epsilon=9.0, population="people")


def test_a_private_mean_in_a_run_without_epsilon_is_charged(blobs: Blobs) -> None:
    result = blobs.run()
    assert result["epsilon"] is None
    charged = [row.body["what"] for row in entries(only_ledger()) if row.body["kind"] == "charge"]
    assert charged == ["training without noise", "centre", "spread", "kinds"]
    with pytest.raises(ConfigError, match="promises no privacy"):
        verify(blobs.directory().path)


def test_unprotected_stays_in_the_run_that_it_was_said_of(lab: Lab) -> None:
    lab.run("one", epsilon=2.0)
    lab.run("two", unprotected=True)
    config: dict[str, Any] = RunDirectory.open(lab.folder / "runs" / "two").config()
    assert config["unprotected"] is True
