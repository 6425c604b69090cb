"""What commands print and what a status file holds is JSON for every reader, also of NaN."""

import json
import math
from contextlib import closing
from pathlib import Path

import umbel
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.service import read_status, write_status
from umbel.server.output.strict import dumps, loads_strictly


def test_no_command_prints_json_by_another_way_than_the_strict_one() -> None:
    """Python's own writer prints NaN and Infinity bare, which no other language reads."""
    files = (Path(umbel.__file__).parent / "commands").glob("*.py")
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert "cli.py" in texts
    assert [name for name, text in texts.items() if "json.dumps(" in text] == []


def test_a_model_that_diverged_leaves_a_status_that_can_be_read(tmp_path: Path) -> None:
    with closing(Enrolment(tmp_path)):
        pass
    said = {"run": "r", "at": 0.0, "nodes": [{"name": "Infinity"}], "ended": True}
    write_status(tmp_path, {**said, "metrics": {"loss": math.nan}, "epsilon": math.inf})
    text = (tmp_path / "status.json").read_text()
    assert loads_strictly(text)["metrics"] == {"loss": "NaN"}
    found = read_status(tmp_path)
    assert math.isnan(found["metrics"]["loss"]) and found["epsilon"] == math.inf
    assert json.loads(text)["nodes"][0]["name"] == "Infinity"
    assert loads_strictly(dumps(found))["epsilon"] == "Infinity"
