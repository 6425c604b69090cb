"""Private runs from end to end, on the embedded engine, with nodes that misbehave."""

import json
import math
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import WarmCommand
from tests.server.tiny_private_app import write_app
from umbel.core.errors import ConfigError
from umbel.privacy.budget.accounting import epsilon, spent
from umbel.privacy.budget.events import RELATIONS
from umbel.running import run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.coordinator_key import data_folder
from umbel.server.private.ledger import entries
from umbel.server.private.verify import charges_in, verify


class Heard(SilentProgress):
    """Remembers what was said, and when rounds ended."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def round_done(self, line: Mapping[str, Any]) -> None:
        self.lines.append(f"round {line['round']}")


def ledger_of(population: str = "people") -> Path:
    """Where a population's ledger is."""
    return data_folder() / "populations" / f"{population}.sqlite"


class Lab:
    """The tiny app in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.app = write_app(folder / "app")
        self.heard = Heard()

    def run(
        self, name: str = "run", *, unprotected: bool = False, **options: Any
    ) -> dict[str, Any]:
        changes = {key.replace("_", "-"): value for key, value in options.items()}
        self.heard = Heard()
        return run(
            self.app,
            options=changes,
            unprotected=unprotected,
            workers=0,
            out=self.folder / "runs" / name,
            progress=self.heard,
        )

    def directory(self, name: str = "run") -> RunDirectory:
        return RunDirectory.open(self.folder / "runs" / name)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "coordinator.pem"))
    return Lab(tmp_path)


def certificate(lab: Lab, name: str = "run") -> dict[str, Any]:
    text = lab.directory(name).certificate_path.read_text()
    value: dict[str, Any] = json.loads(text)
    return value


def test_epsilon_alone_is_enough(lab: Lab) -> None:
    result = lab.run(epsilon=3.0)
    assert 2.99 < result["epsilon"] <= 3
    assert result["delta"] == 1e-5
    assert result["epsilon_against"] == {"model-user": result["epsilon"], "server": math.inf}
    assert result["stopped"] == "rounds"
    z = result["noise_multiplier"]
    assert epsilon(z, 1.0, 3, 1e-5) == pytest.approx(result["epsilon"], abs=1e-5)
    before = lab.heard.lines[: lab.heard.lines.index("round 1")]
    assert any("epsilon 3 at delta 1e-05" in line and f"{z:g}" in line for line in before)
    assert verify(lab.directory().path) == []
    card = (lab.directory().path / "MODEL_CARD.md").read_text()
    assert "against server" in card
    assert "no protection" in card
    lines = lab.directory().rounds()
    assert [line["epsilon"] for line in lines[1:]] == sorted(line["epsilon"] for line in lines[1:])


def test_a_run_with_nearly_no_noise_ends_like_any_other(lab: Lab) -> None:
    result = lab.run(noise_multiplier=1e-3, rounds=1)
    assert result["epsilon"] > 1000  # e^1000 is no float
    assert "factor of at most e^" in (lab.directory().path / "MODEL_CARD.md").read_text()


def test_bad_nodes_are_rejected_by_name_and_the_guarantee_holds(lab: Lab) -> None:
    bad = {
        1: "nan", 2: "inf", 3: "huge", 4: "long", 5: "off-grid", 6: "integers", 7: "double",
        8: "short", 10: "missing", 12: "raise",
    }  # fmt: skip
    clipped_or_harmless = {9: "zero", 11: "extra"}
    words = " ".join(f"{node}:{kind}" for node, kind in (bad | clipped_or_harmless).items())
    result = lab.run(noise_multiplier=3.0, bad=words, release_metrics="loss:1")
    assert result["rounds"] == 3
    for line in lab.directory().rounds()[1:]:
        assert {item["node"] for item in line["failed"]} == {str(node) for node in bad}
        assert line["federated"] is None
        assert line["clients"] == 20 - len(bad)
        # what a node says beside its update is not listened to, and its metric is cut
        assert abs(line["train"]["private-metrics.loss"]) < 60
    assert math.isfinite(result["metrics"]["mean"])
    assert verify(lab.directory().path) == []


def test_the_round_that_would_exceed_the_budget_does_not_run(lab: Lab) -> None:
    result = lab.run(epsilon=4.0, noise_multiplier=2.0, cohort_size=10.0, rounds=40)
    assert result["stopped"] == "budget"
    rounds = result["rounds"]
    assert 1 < rounds < 40
    assert result["epsilon"] <= 4.0 < epsilon(2.0, 0.5, rounds + 1, 1e-5)
    assert lab.directory().model_path.exists()
    assert verify(lab.directory().path) == []


def test_runs_about_one_population_share_a_budget(lab: Lab) -> None:
    first = lab.run("one", epsilon=1.0, population="people")
    second = lab.run("two", epsilon=2.0, population="people")
    assert first["epsilon"] <= 1 < second["epsilon"] <= 2
    assert any("has spent epsilon" in line for line in lab.heard.lines)
    with pytest.raises(ConfigError, match="is spent"):
        lab.run("three", epsilon=2.0, population="people")
    third = lab.run("four", epsilon=1.0, population="other-people")
    assert third["epsilon"] <= 1
    assert verify(lab.directory("one").path) == []
    assert verify(lab.directory("two").path) == []


def test_a_ledger_of_another_population_is_refused(lab: Lab) -> None:
    lab.run("one", epsilon=1.0, population="people")
    ledger = str(ledger_of())
    with pytest.raises(ConfigError, match="'people'"):
        lab.run("two", epsilon=2.0, population="other", ledger=ledger)


@pytest.mark.parametrize("mechanism", ["gaussian", "banded"])
def test_a_killed_run_goes_on_and_pays_for_repeated_rounds(
    umbel: WarmCommand, lab: Lab, mechanism: str
) -> None:
    options: dict[str, Any] = {"noise-multiplier": 4.0, "rounds": 6, "population": "people"}
    options |= {"mechanism": mechanism, "separation": 3 if mechanism == "banded" else 0}
    out = lab.folder / "runs" / "run"
    deaths = [("umbel.server.checkpoint:save", 4, "before")]
    killed = umbel.run(
        cwd=lab.folder, app=lab.app, options=options, workers=0, out=out, deaths=deaths
    )
    assert killed.status == -signal.SIGKILL, killed.err
    ledger = ledger_of()
    before = charges_in(entries(ledger))["model-user"]
    result = run(resume=out, workers=0, progress=Heard())
    assert result["rounds"] == 6
    rounds = [row.body["round"] for row in entries(ledger) if "round" in row.body]
    assert set(rounds) == {1, 2, 3, 4, 5, 6}
    assert len(rounds) > 6  # the round that ended without a checkpoint was paid twice
    after = charges_in(entries(ledger))["model-user"]
    assert before <= after
    assert result["epsilon"] == pytest.approx(spent(after, 1e-5).epsilon)
    assert result["epsilon"] > _uninterrupted(mechanism)
    assert verify(out) == []


def _uninterrupted(mechanism: str) -> float:
    times = 6 if mechanism == "gaussian" else 2
    return epsilon(4.0, 1.0, times, 1e-5)


def test_separation_is_kept_and_charged(lab: Lab) -> None:
    result = lab.run(epsilon=3.0, mechanism="banded", separation=4, rounds=9, population="people")
    assert result["rounds"] == 9
    assert result["epsilon"] <= 3
    z = result["noise_multiplier"]
    assert epsilon(z, 1.0, 3, 1e-5) == pytest.approx(result["epsilon"], rel=1e-3)
    database = ledger_of()
    with closing(sqlite3.connect(database)) as opened:
        rows = opened.execute("SELECT node, last, times FROM participation").fetchall()
    assert len(rows) == 20
    assert max(times for _, _, times in rows) <= 3  # nine rounds, every fourth
    assert sum(times for _, _, times in rows) == 45  # five rested nodes a round
    assert certificate(lab)["mechanism"]["separation"] == 4
    assert verify(lab.directory().path) == []


def test_tree_aggregation_runs(lab: Lab) -> None:
    result = lab.run(epsilon=3.0, mechanism="tree", separation=2, rounds=4)
    assert 2.9 < result["epsilon"] <= 3
    assert verify(lab.directory().path) == []


def test_local_noise_protects_from_the_server(lab: Lab) -> None:
    result = lab.run(epsilon=8.0, mechanism="local", cohort_size=10.0, rounds=4)
    against = result["epsilon_against"]
    assert 0 < against["server"] <= 8
    assert against["model-user"] == against["server"] == result["epsilon"]
    kinds = {row["against"]: row for row in certificate(lab)["guarantees"]}
    assert kinds["server"]["relation"] == "replace-one"
    # Beside the coordinator's number stands what the nodes' own ledgers say.
    spent_by = [row["epsilon"] for row in certificate(lab)["statements"]["nodes"]]
    assert max(spent_by) <= against["server"] * 1.001
    page = write_report(lab.directory().path).read_text(encoding="utf-8")
    for text in (page, (lab.directory().path / "MODEL_CARD.md").read_text()):
        assert f"ledgers (not signed), {len(spent_by)} nodes have spent epsilon" in text
        assert f"{max(spent_by):.2g}"[:3] in text
    assert verify(lab.directory().path) == []


def test_a_fixed_number_of_nodes_is_charged_as_that(lab: Lab) -> None:
    result = lab.run(noise_multiplier=4.0, sampling="fixed", cohort_size=5.0)
    (row,) = [r for r in certificate(lab)["events"] if r["against"] == "model-user"]
    assert row["event"]["mechanism"] == "sampled-without-replacement"
    assert row["relation"] == "replace-one"
    assert result["epsilon"] > epsilon(4.0, 0.25, 3, 1e-5)


def test_cohorts_that_are_drawn_otherwise_than_the_options_say_are_said(lab: Lab) -> None:
    lab.run(noise_multiplier=4.0, cohort="fixed", cohort_size=5.0, rounds=1)
    assert any("cohort=fixed is what" in line and "poisson" in line for line in lab.heard.lines)
    assert lab.directory().config()["cohorts"] == "poisson, 5"
    assert "poisson, 5" in write_report(lab.directory().path).read_text(encoding="utf-8")
    assert verify(lab.directory().path) == []


def test_a_cap_is_charged_as_truncation(lab: Lab) -> None:
    lab.run(noise_multiplier=4.0, cohort_size=5.0, cohort_cap=8)
    (row,) = [r for r in certificate(lab)["events"] if r["against"] == "model-user"]
    assert row["event"]["mechanism"] == "truncated-poisson-gaussian"
    assert (row["event"]["cap"], row["times"]) == (8, 3)


def test_an_empty_cohort_is_charged_and_releases_noise(lab: Lab) -> None:
    result = lab.run(noise_multiplier=4.0, cohort_size=1e-9)
    lines = lab.directory().rounds()[1:]
    assert [line["clients"] for line in lines] == [0, 0, 0]
    assert len({line["metrics"]["mean"] for line in lines}) == 3
    assert result["epsilon"] > 0 or certificate(lab)["events"][0]["times"] == 3


def test_noise_cannot_be_repeated_unless_somebody_says_insecure(lab: Lab) -> None:
    def model(name: str, **options: Any) -> torch.Tensor:
        lab.run(name, noise_multiplier=1.0, seed=5, **options)
        return lab.directory(name).read_model()["w"]

    assert not torch.equal(model("a"), model("b"))
    assert torch.equal(model("c", insecure_noise_seed=1), model("d", insecure_noise_seed=1))
    result = lab.directory("d").result()
    assert result["privacy"] == "off (seeded)"
    assert result["epsilon"] == math.inf
    assert any("privacy: off (seeded)" in line for line in lab.heard.lines)
    assert "Nobody: the noise was seeded" in (lab.directory("d").path / "MODEL_CARD.md").read_text()
    assert verify(lab.directory("d").path) == []
    seeded = lab.run("e", epsilon=3.0, insecure_noise_seed=1)
    assert seeded["epsilon"] == math.inf
    assert seeded["noise_multiplier"] == lab.run("f", epsilon=3.0)["noise_multiplier"]


def test_a_delta_that_gives_one_node_away_is_warned_of(lab: Lab) -> None:
    lab.run(noise_multiplier=4.0, delta=0.05, rounds=1)
    assert any("delta 0.05 is not below" in line for line in lab.heard.lines)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"epsilon": 3.0, "delta": 1.0}, "delta"),
        ({"epsilon": 3.0, "clipping_norm": 0.0}, "clipping-norm"),
        ({"epsilon": 1e-8, "delta": 1e-9}, "no noise meets"),
        ({"epsilon": 3.0, "cohort_size": 21.0}, "20 nodes"),
        ({"epsilon": 3.0, "buffers": "mean"}, "running statistics"),
        ({"epsilon": 3.0, "mechanism": "banded", "separation": 21}, "lower separation"),
        ({"epsilon": 3.0, "population": "../people"}, "population"),
    ],
)
def test_bad_input_is_one_sentence(lab: Lab, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        lab.run(**options)


# ---- certificates


def _edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _lower_epsilon(value: dict[str, Any]) -> None:
    value["guarantees"][0]["epsilon"] = 0.1


def _less_noise(value: dict[str, Any]) -> None:
    value["mechanism"]["noise_multiplier"] = 99.0


def _fewer_events(value: dict[str, Any]) -> None:
    value["events"][0]["times"] -= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lower_epsilon, ["signature", "adds up to", "result.json"]),
        (_less_noise, ["signature", "mechanism: noise_multiplier"]),
        (_fewer_events, ["signature", "list of events"]),
        (lambda value: value.pop("model"), ["cannot be read"]),
    ],
)
def test_an_edited_certificate_shows(lab: Lab, change: Any, words: list[str]) -> None:
    lab.run(noise_multiplier=4.0)
    _edit(lab.directory().certificate_path, change)
    problems = "\n".join(verify(lab.directory().path))
    for word in words:
        assert word in problems


def test_another_model_ledger_or_key_shows(lab: Lab) -> None:
    lab.run("run", noise_multiplier=4.0, population="people")
    lab.run("other", noise_multiplier=4.0, population="people")
    one, other = lab.directory("run"), lab.directory("other")
    public = certificate(lab)["key"]
    assert verify(one.path, key=public) == []
    assert "another key" in verify(one.path, key="AAAA")[0]
    model = one.model_path.read_bytes()
    one.model_path.write_bytes(other.model_path.read_bytes())
    assert "is not the model" in verify(one.path)[0]
    one.model_path.write_bytes(model)
    one.ledger_path.write_bytes(other.ledger_path.read_bytes())
    problems = "\n".join(verify(one.path))
    assert "the ledger has" in problems
    assert "adds up to" in problems
    one.ledger_path.unlink()
    assert "there is no ledger" in verify(one.path)[0]


def test_a_truncated_ledger_shows(lab: Lab) -> None:
    lab.run(noise_multiplier=4.0)
    with closing(sqlite3.connect(lab.directory().ledger_path)) as database:
        database.execute("DROP TRIGGER entry_kept")
        database.execute("DELETE FROM entry WHERE number > (SELECT MAX(number) FROM entry) - 2")
        database.commit()
    problems = "\n".join(verify(lab.directory().path))
    assert "the certificate was issued for" in problems
    assert "has no charge for it" in problems


def test_a_run_without_privacy_has_nothing_to_verify(lab: Lab) -> None:
    result = lab.run()
    assert result["epsilon"] is None
    with pytest.raises(ConfigError, match="promises no privacy"):
        verify(lab.directory().path)


def test_every_relation_has_a_name_in_certificates() -> None:
    assert set(RELATIONS) == {"add-or-remove-one", "replace-one", "zero-out-one"}
