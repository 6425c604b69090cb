"""The policy file of a node: what it may say, what is in force, and what it says by itself."""

import tomllib
from pathlib import Path

import pytest

from umbel.core.errors import ConfigError
from umbel.strategies.policy.keys import KEYS, default_file
from umbel.strategies.policy.node_policy import NodePolicy, PolicyError
from umbel.strategies.policy.reading import load_policy, policy_of, policy_path
from umbel.strategies.protection import Protection


@pytest.mark.parametrize(
    "text",
    [
        "answer = 'train'",
        'answer = ["training"]',
        'apps = ["abc"]',
        "apps = 3",
        "unprotected = 1",
        "max-norm = 0",
        "max-norm = inf",
        "min-noise = -1.0",
        "min-noise = nan",
        "participations = 0",
        "participations = true",
        "epsilon = 'eight'",
        "record-epsilon = 0.0",
        "epsilon = nan",
        "epsilon = -inf",
        "epsilon = 'none'",
        'metrics = "some"',
        "counts = true",
        'errors = "all"',
        'other-options = "none"',
        "options = 3",
        "[options]\nrounds = {least = 3}",
        "[options]\nrounds = {}",
        "[options]\nrounds = {min = 'a'}",
        "[options]\nrounds = {min = nan}",
        "[options]\nrounds = []",
        "[options]\nrounds = [[1]]",
        "min-nose = 1.0",
        "[min-noise]\nvalue = 1.0",
        "unprotected = true\nepsilon = 8.0",
    ],
)
def test_what_cannot_be_meant_stops_the_node(tmp_path: Path, text: str) -> None:
    """A typing error must never mean a weaker policy."""
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"policy\.toml says"):
        load_policy(file)


@pytest.mark.parametrize("said", ["'unlimited'", "inf"])
def test_no_limit_asks_nothing_of_updates_and_is_not_the_first_promise(
    tmp_path: Path, said: str
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(f"epsilon = {said}\nrecord-epsilon = {said}\nunprotected = true\n")
    policy = load_policy(file)
    policy.check_protection(Protection())
    assert policy.unprotected and not policy.protects
    assert policy.in_force()["epsilon"] == policy.in_force()["record-epsilon"] == "unlimited"
    assert NodePolicy().in_force()["epsilon"] == "what the first run promises"
    file.write_text(f"epsilon = {said}\nrecord-epsilon = 8.0\n")
    with pytest.raises(PolicyError, match="record-epsilon is limited"):
        load_policy(file).check_protection(Protection())


def test_the_file_that_a_node_writes_itself_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(default_file())
    assert load_policy(file) == NodePolicy()
    for key in KEYS:
        assert f"\n#{key.name} = " in default_file() or key.name == "options"
        if key.example and key.name not in ("apps", "roster", "authority"):
            assert key.fits(tomllib.loads(f"v = {key.example}")["v"]), key.name


def test_every_line_of_that_file_can_be_used(tmp_path: Path) -> None:
    lines = default_file().splitlines()
    used = [line[1:] for line in lines if line.startswith("#") and not line.startswith("# ")]
    skipped = ("apps", "roster", "authority", "unprotected")  # of this owner's own; or it conflicts
    file = tmp_path / "policy.toml"
    file.write_text("\n".join(line for line in used if not line.startswith(skipped)))
    policy = load_policy(file)
    assert {*policy.given, *skipped} == {key.name for key in KEYS}
    assert not policy.unprotected
    assert policy.in_force().keys() == {key.name for key in KEYS}
    assert policy.in_force()["options"] == {
        "local-epochs": {"min": 1, "max": 5},
        "optimizer": ["fedavg"],
    }


def test_one_file_is_named_once() -> None:
    assert policy_path({}) == ""
    assert policy_path({"policy": "a"}) == policy_path({"secure-policy": "a"}) == "a"
    assert policy_path({"policy": "a", "secure-policy": "a"}) == "a"
    with pytest.raises(ConfigError, match="a and b; name one file"):
        policy_path({"policy": "a", "secure-policy": "b"})
    assert policy_of({}) == NodePolicy()
