"""`umbel client budget`: what a node's data have paid, for people and for scripts."""

import json
from pathlib import Path

from tests.clients.node_asker import DP_SGD, QueryRunner
from tests.fakes import WarmCommand


def test_it_shows_each_count_with_its_limit_and_who_asked_last(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    state = tmp_path / "ada"
    state.mkdir()
    empty = umbel.command("client", "budget", "--state", state, cwd=tmp_path / "here")
    assert (empty.status, empty.out) == (0, "nothing that is counted has left this node\n")
    node = QueryRunner(DP_SGD, state, {"rounds": 3, "batch-size": 10}, run=77)
    node.more = {"umbel-coordinator": "hub.example:7443"}
    node.ask(1)
    node.ask(2)
    said = umbel.command("client", "budget", "--state", state, cwd=tmp_path / "here")
    assert said.status == 0, said.err
    assert "data default: each of its records" in said.out
    assert "(of 0.5, by first promise), at delta 1e-05, add-or-remove-one" in said.out
    assert "run 77, coordinator hub.example:7443" in said.out
    (state / "policy.toml").write_text("record-epsilon = 9.0\nparticipations = 20\n")
    found = umbel.command("client", "budget", "--state", state, "--json", cwd=tmp_path / "here")
    result = found.result
    assert Path(result["ledger"]) == state / "ledger.sqlite"
    assert {row["scope"] for row in result["budget"]} == {"population", "data"}
    for row in result["budget"]:
        assert (row["participations"], row["participations_limit"]) == (2, 20)
        assert (row["epsilon_limit"], row["limit_from"]) == (9.0, "policy")
        assert 0.0 < row["epsilon"] < 0.5
    (state / "policy.toml").write_text('record-epsilon = "unlimited"\n')
    said = umbel.command("client", "budget", "--state", state, cwd=tmp_path / "here")
    assert "(no limit, by policy), at delta 1e-05" in said.out
    assert json.dumps(result, allow_nan=False)


def test_a_folder_that_is_not_there_is_one_sentence(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = umbel.command("client", "budget", "--state", tmp_path / "no", cwd=tmp_path / "here")
    assert ended.status == 2
    assert "there is no folder" in ended.err
