"""A position survives as it was; node states are those of the position's round."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from umbel.core.errors import ConfigError, RunError
from umbel.server import checkpoint
from umbel.server.checkpoint import Best, Position, load, load_nodes, save
from umbel.strategies.samplers import NodeHistory


def position(round_: int = 3, **more: Any) -> Position:
    return Position(round_, torch.arange(5.0), torch.zeros(0), **more)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_everything_comes_back(tmp_path: Path) -> None:
    before = position(
        slots={"first": torch.randn(5), "steps": torch.ones(1)},
        layers=({"bound": 1.5, "sum": torch.randn(5, dtype=torch.float64), "n": 3}, None, {}),
        best=Best(0.25, 2, torch.randn(5), torch.randn(2)),
        evaluations_since_best=1,
        average=torch.randn(5),
        averaged=2,
        failed_rounds=1,
        history={"one": NodeHistory(2, 3, {"loss": 0.5}), "two": NodeHistory(1, 1)},
    )
    assert load(tmp_path) is None
    save(tmp_path, before, {})
    after = load(tmp_path)
    assert after is not None and same(before, after)
    save(tmp_path, position(4), {})
    assert same(load(tmp_path), position(4)), "and the next one replaces it whole"


def test_node_states_are_those_of_the_positions_round(tmp_path: Path) -> None:
    save(tmp_path, position(1), {7: b"a1", 8: b"b1"})
    save(tmp_path, position(2), {7: b"a2"})
    save(tmp_path, position(3), {8: b"b3"})
    assert load_nodes(tmp_path, 3) == {7: b"a2", 8: b"b3"}
    checkpoint._save_nodes(tmp_path / "nodes.sqlite", 4, {7: b"a4", 9: b"c4"})  # and a kill here
    assert load_nodes(tmp_path, 3) == {7: b"a2", 8: b"b3"}
    assert load_nodes(tmp_path, 4) == {7: b"a2", 8: b"b3"}, "what did not happen is gone"


def test_states_of_many_rounds_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(1, 40):
        save(tmp_path, position(number), {7: bytes(10_000), 8: bytes(10_000)})
    assert (tmp_path / "nodes.sqlite").stat().st_size < 40 * 10_000


def test_a_run_that_never_got_to_a_position_forgets_its_nodes(tmp_path: Path) -> None:
    checkpoint._save_nodes(tmp_path / "nodes.sqlite", 1, {7: b"from the future"})
    assert load(tmp_path) is None
    assert load_nodes(tmp_path, 0) == {}


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "text"])
def test_damage_is_a_sentence(damage: str, tmp_path: Path) -> None:
    save(tmp_path, position(), {})
    file = tmp_path / "position.safetensors"
    data = file.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, file)
    else:
        file.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello" * 9}[damage]
        )
    with pytest.raises(ConfigError, match=r"position\.safetensors is damaged .*; start a new run"):
        load(tmp_path)


def test_a_place_that_cannot_be_written_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, position(1), {})
    (tmp_path / "blocked").write_text("")
    with pytest.raises(RunError, match=r"cannot be written .*; make room and continue the run"):
        save(tmp_path / "blocked", position(2), {})
    assert same(load(tmp_path), position(1))
    assert [file.name for file in tmp_path.glob("*.tmp")] == []
