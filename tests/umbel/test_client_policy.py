"""`umbel client policy`, and the policy on Flower's engine."""

import json
from pathlib import Path

from tests.fakes import WarmCommand
from umbel.clients.process.membership import Membership, NodeSettings
from umbel.flower_node import _command
from umbel.strategies.policy.keys import KEYS
from umbel.transport.certificates import make_server_identity, open_authority, save_identity


def test_it_shows_the_file_with_comments_and_what_is_in_force(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    state = tmp_path / "ada"
    state.mkdir()
    here = tmp_path / "here"
    said = umbel.command("client", "policy", "--state", state, cwd=here)
    assert said.status == 0, said.err
    for key in KEYS:
        for line in key.meaning:
            assert f"# {line}\n" in said.out
        assert f"#   {key.name:16} " in said.out
    (state / "policy.toml").write_text("min-noise = 2.0\n[options]\nrounds = {max = 9}\n")
    found = umbel.command("client", "policy", "--state", state, "--json", cwd=here).result
    assert found["file"] == str(state / "policy.toml")
    assert found["policy"]["min-noise"] == 2.0
    assert found["policy"]["options"] == {"rounds": {"max": 9}}
    assert found["policy"]["unprotected"] is False
    (state / "policy.toml").write_text("epsilon = inf\n[options]\nrounds = {max = inf}\n")
    found = umbel.command("client", "policy", "--state", state, "--json", cwd=here).result
    assert found["policy"]["epsilon"] == "unlimited"
    assert found["policy"]["options"] == {"rounds": {"max": "Infinity"}}
    assert json.dumps(found, allow_nan=False)


def test_what_cannot_be_used_is_one_sentence(umbel: WarmCommand, tmp_path: Path) -> None:
    here, state = tmp_path / "here", tmp_path / "ada"
    ended = umbel.command("client", "policy", "--state", state, cwd=here)
    assert ended.status == 2 and "there is no folder" in ended.err
    state.mkdir()
    (state / "policy.toml").write_text("min-nose = 1.0")
    ended = umbel.command("client", "policy", "--state", state, cwd=here)
    assert ended.status == 2
    assert "says min-nose = 1.0, which is no such setting; known are answer, apps," in ended.err
    (tmp_path / "strict.toml").write_text("mode = 3")
    words = (
        "--policy",
        tmp_path / "strict.toml",
        "--certificate",
        "a",
        "--key",
        "b",
        "--root",
        "c",
    )
    ended = umbel.command(
        "client", "app", "--state", state, "--address", "127.0.0.1:9", *words, cwd=here
    )
    assert ended.status == 2
    assert "says mode = 3" in ended.err


def test_a_supernode_is_told_where_the_policy_lies(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    save_identity(tmp_path / "node" / "identity.pem", make_server_identity(authority, ["ada"]))
    membership = Membership(tmp_path / "node")
    (tmp_path / "node" / "flower").mkdir()
    try:
        for config, file in (
            ({}, tmp_path / "node" / "policy.toml"),
            ({"secure-policy": "/etc/old.toml"}, Path("/etc/old.toml")),
        ):
            settings = NodeSettings("hub.example:7443", "ada", node_config=config)
            command = _command(membership, settings)
            words = command[command.index("--node-config") + 1]
            assert f'policy="{file}"' in words
            assert "secure-policy" not in words
    finally:
        membership.close()
