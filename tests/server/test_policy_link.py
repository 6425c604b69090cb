"""A node's policy, and rounds that are answered once, between real processes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import eventually
from tests.server.test_secure_link import APP

OWN = "no bare update leaves, and this run neither sums in secret nor adds noise on the nodes"


def lines_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run"]) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["round"]]


@pytest.mark.slow
def test_a_policy_is_refused_by_name_on_both_sides_and_the_node_stays(processes: Any) -> None:
    processes.write_app(APP, "rounds = 4\nclient-eval-every = -1")
    names = ("clinic-a", "clinic-b", "clinic-c")
    processes.invite(*names)
    (processes.folder / "own.toml").write_text("unprotected = false\n")
    processes.server("--serve")
    for number, name in enumerate(names):
        words = ["--node-config", f"partition-id={number} num-partitions=3"]
        words += ["--policy", "own.toml"] if name == "clinic-c" else []
        processes.node(name, *words)
    result = eventually(lambda: processes.result(), 240)
    for line in lines_of(result):
        assert line["clients"] == 2
        assert [each["node"] for each in line["failed"]] == ["clinic-c"]
        assert f"this node's policy (unprotected) refuses: {OWN}" in line["failed"][0]["reason"]
    assert OWN in processes.log("clinic-c")
    assert OWN in processes.log("server")
    states = {node["name"]: node["state"] for node in processes.status()["nodes"]}
    assert states["clinic-c"] == "connected"
    # What the owner changes counts from the next message on; a secure run is what it asks for.
    processes.umbel("submit", "--state", "state", "-c", "secure=true")
    done = eventually(lambda: (r := processes.result())["run"] != result["run"] and r, 240)
    assert [line["clients"] for line in lines_of(done)] == [3, 3, 3, 3]
    # The others have a commented file that changes nothing, and can look at what is in force.
    shown = json.loads(processes.umbel("client", "policy", "--state", "clinic-c", "--json").stdout)
    assert shown["file"] == str(processes.folder / "own.toml")
    assert shown["policy"]["unprotected"] is False and len(shown["app"]) == 64
    said = processes.umbel("client", "policy", "--state", "clinic-a").stdout
    assert "#min-noise = 1.0" in said and "#   unprotected      true" in said
    assert f"is {shown['app']}" in said
    processes.running["server"].terminate()
    assert processes.wait("server", 60) == 0


@pytest.mark.slow
def test_a_killed_coordinator_and_killed_nodes_go_on_in_a_secure_run(processes: Any) -> None:
    rounds = 60
    processes.write_app(APP, f"secure = true\nrounds = {rounds}\nclient-eval-every = -1")
    names = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")
    processes.invite(*names)
    processes.server()
    for number, name in enumerate(names):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions=4")
    for at in (5, 20):
        eventually(lambda at=at: processes.status().get("round", 0) >= at, 240)
        processes.kill("server")
        if at == 20:
            processes.kill("clinic-b")
            processes.node("clinic-b")
        time.sleep(0.1)
        processes.server()
    assert processes.wait("server", 480) == 0, processes.log("server")
    result = processes.result()
    found = [line["round"] for line in lines_of(result)]
    missing = sorted({*range(1, rounds + 1)} - {*found})
    assert found == sorted(found) and found[-1] == rounds
    assert len(missing) < rounds // 2  # what was under way at a kill, and not yet saved
    assert result["stopped"] == "rounds"
    spent = {name: (processes.folder / name / "rounds").read_text().split() for name in names}
    for name, words in spent.items():
        given = [int(number) for number in words[1::2]]
        assert given == sorted(set(given)), name  # no round twice, and only upwards
