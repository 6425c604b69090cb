"""Flower's own SuperLink and SuperNodes: the nodes' policies, ledgers and statements hold there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.server.test_node_ledger_link import APP
from tests.server.test_standalone import FILE
from umbel.server.private.verify import schema

NAMES = ("clinic-a", "clinic-b", "clinic-c")


def lines_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run"]) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["round"]]


def budgets(processes: Any, name: str) -> dict[str, Any]:
    """What a node's ledger says of its data, by unit."""
    said = processes.umbel("client", "budget", "--state", name, "--json").stdout
    rows = json.loads(said.splitlines()[-1])["budget"]
    return {row["unit"]: row for row in rows if row["scope"] == "data"}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_policy_ledger_and_statements_hold_on_supernodes(processes: Any) -> None:
    """Each message of a SuperNode has a process of its own: what counts is in its folder."""
    processes.write_app(APP, "rounds = 2\nbatch-size = 10\nexample-epsilon = 0.5")
    processes.invite(*NAMES)
    (processes.folder / "b.toml").write_text("record-epsilon = 0.6\n")
    (processes.folder / "c.toml").write_text('mode = "malicious"\n')
    processes.server("--engine", "flower")
    for number, name in enumerate(NAMES):
        words = ["--node-config", f"partition-id={number} num-partitions=3"]
        words += [] if name == "clinic-a" else ["--policy", f"{name[-1]}.toml"]
        processes.node(name, "--engine", "flower", *words)
    assert processes.wait("server", 1500) == 0, processes.log("server")
    result = processes.result()
    # The owner of the third lets updates leave in secure sums alone: refused by name, each round.
    for line in lines_of(result):
        assert line["clients"] == 2
        (failed,) = line["failed"]
        assert "this node's policy (mode) refuses: mode asks for secure sums" in failed["reason"]
    assert budgets(processes, "clinic-c") == {}
    # The others were charged in their own folders, and have signed what they were charged for.
    spent = {name: budgets(processes, name) for name in NAMES[:2]}
    for name, limit, whose in (("clinic-a", 0.5, "first promise"), ("clinic-b", 0.6, "policy")):
        (row,) = spent[name].values()
        assert (row["unit"], row["participations"]) == ("record", 2)
        assert (row["epsilon_limit"], row["limit_from"]) == (limit, whose)
        assert 0.4 < row["epsilon"] <= 0.5
        assert row["last_coordinator"] == f"127.0.0.1:{processes.port}"
    certificate = json.loads((Path(result["run"]) / "certificate.json").read_text())
    jsonschema.validate(certificate, schema())
    rows = certificate["statements"]["nodes"]
    assert [row["signed"] for row in rows] == [True, True]
    assert sorted(row["epsilon"] for row in rows) == sorted(
        spent[name]["record"]["epsilon"] for name in NAMES[:2]
    )
    key = processes.umbel("key", "--state", "state").stdout
    (processes.folder / "hub.pub").write_text(key)
    said = processes.umbel("verify", result["run"], "--key", "hub.pub").stdout
    assert said.startswith("signed by the coordinator whose key was given")
    assert said.rstrip().endswith("the certificate holds")
    alone = [sys.executable, str(FILE), result["run"], "--key", str(processes.folder / "hub.pub")]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Another run of the same coordinator, which asks for sixteen times as much.
    processes.server("--engine", "flower", "--fresh", "-c", "example-epsilon=8 rounds=1")
    processes.wait("server", 900)
    assert "takes no further part" in processes.log("server") + processes.log("clinic-a")
    assert {name: budgets(processes, name) for name in NAMES[:2]} == spent
