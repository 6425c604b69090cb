"""The benchmark of methods: what it runs, that it goes on after a stop, and what it refuses."""

from pathlib import Path

import pytest

from umbel.benchmarks.methods import suite
from umbel.benchmarks.methods.settings import METHODS, SETTINGS, SPLITS, setting_named
from umbel.core.errors import ConfigError
from umbel.federation import Federation
from umbel.running import run
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.methods.named import METHODS as OWN

CHANGES = {"rounds": 2, "cohort-size": 4.0, "local-epochs": 1}


def test_every_method_and_selection_has_a_line() -> None:
    said = {str(options.get("method", "fedavg")) for options in METHODS.values()}
    assert said == set(OWN) - {"fedbn"}, "the models have no batch normalisation"
    federation = Federation(**SETTINGS["digits"].parts())
    for split in SPLITS:
        for options in METHODS.values():
            federation.check_options(federation.complete({**options, "split": split}))


def test_runs_that_ended_are_not_run_again_and_the_table_is_of_them(tmp_path: Path) -> None:
    setting, told = SETTINGS["digits"], list[str]()
    runs = suite.planned(tmp_path, ["fedavg", "fedper"], ["shards"], 2, CHANGES)
    federation = Federation(**setting.parts())
    suite.measure(federation, run, 20, runs[:3], told.append)
    assert len(told) == 3 and "3/3 shards, fedavg, seed 1" in told[-1]
    before = {one.folder: RunDirectory(one.folder).result() for one in runs[:3]}
    told.clear()
    suite.measure(federation, run, 20, runs, told.append)
    assert told[0] == "3 of 4 runs are there already" and len(told) == 2
    assert all(RunDirectory(folder).result() == result for folder, result in before.items())
    found = suite.write("digits", suite.tables(setting, runs), tmp_path)
    lines = {line["name"]: line for line in found["splits"]["shards"]["groups"]}
    assert list(lines) == ["fedavg", "fedper"]
    assert lines["fedavg"]["seeds"] == [0, 1] and lines["fedavg"]["last"]["runs"] == 2
    assert lines["fedper"]["own"]["mean"] > lines["fedavg"]["own"]["mean"]
    assert lines["fedper"]["bytes_up"]["mean"] < lines["fedavg"]["bytes_up"]["mean"]
    assert (tmp_path / "methods.md").read_text().count("\n| fed") == 2
    other = suite.planned(tmp_path, ["fedavg"], ["shards"], 1, {**CHANGES, "rounds": 3})
    with pytest.raises(ConfigError, match="write to another folder"):
        suite.measure(federation, run, 20, other)


def test_what_there_is_not_is_a_sentence(tmp_path: Path) -> None:
    for methods, splits in ((["fedsgd"], ["shards"]), (["fedavg"], ["iid"])):
        with pytest.raises(ConfigError, match="it can be"):
            suite.planned(tmp_path, methods, splits, 1, {})
    with pytest.raises(ConfigError, match="--data is 'mnist'; it can be digits, fashion-mnist"):
        setting_named("mnist")
