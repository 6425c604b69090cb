"""Privacy on the link: real nodes are the same people in every run of a state folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.server.tiny_private_app import write_app
from umbel.privacy.budget.accounting import epsilon
from umbel.server.private.verify import verify


@pytest.mark.slow
def test_runs_with_real_nodes_continue_one_budget(processes: Any) -> None:
    shutil.rmtree(processes.app, ignore_errors=True)
    write_app(processes.app)
    processes.invite("ada", "bob")
    spent = []
    for _ in range(2):
        options = "noise-multiplier=4 rounds=2 bad='1:nan'"
        processes.server("-c", options, "--nodes", "2")
        for name, part in (("ada", 0), ("bob", 1)):
            running = processes.running.get(name)
            if running is None or running.poll() is not None:
                words = f"partition-id={part} num-partitions=2"
                processes.node(name, "--node-config", words)
        assert processes.wait("server") == 0, processes.log("server")
        last = [line for line in processes.log("server").splitlines() if line.startswith("{")][-1]
        spent.append(json.loads(last))
    assert spent[0]["epsilon"] == pytest.approx(epsilon(4.0, 1.0, 2, 1e-5))
    assert spent[1]["epsilon"] == pytest.approx(epsilon(4.0, 1.0, 4, 1e-5))
    assert "has spent epsilon" in processes.log("server")
    assert (processes.state / "populations" / "default.sqlite").is_file()
    for said in spent:
        run = processes.folder / said["run"]
        assert verify(Path(run)) == []
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {item["node"] for line in lines for item in line.get("failed", ())} == {"bob"}
