"""The secure sum among honest nodes: exact, through every loss, and silent about each node."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import graph, masks, packing
from umbel.strategies.secure.checks import AbortedError
from umbel.strategies.secure.local_session import STAGES, LocalSession
from umbel.strategies.secure.message import Plain


def draw(count: int, size: int, bits: int, seed: int = 0) -> dict[int, masks.Words]:
    """Vectors of nodes whose ids are neither small nor in a row."""
    rows = np.random.default_rng(seed).integers(0, 1 << bits, (count, size))
    return {5 + 11 * i: row.astype(masks.word(bits)) for i, row in enumerate(rows)}


@given(st.integers(3, 9), st.integers(1, 80), st.integers(8, 62), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_sum_is_exact_bit_for_bit(count: int, size: int, bits: int, seed: int) -> None:
    session = LocalSession.of(draw(count, size, bits, seed), bits, mode="semi-honest")
    released = session.run()
    assert released.included == tuple(session.values)
    assert released.total.tolist() == session.expected(released)
    assert released.dropped == ()
    assert released.trust == "first-use"


def test_node_ids_of_64_bits() -> None:
    values = {2**64 - 1 - i: np.full(4, i, "<u4") for i in range(6)}
    assert LocalSession.of(values).run().total.tolist() == [15] * 4


@pytest.mark.parametrize("count", [3, 4, 5, 6])
@pytest.mark.parametrize("stage", range(5))
def test_every_set_of_nodes_may_vanish_at_every_stage(count: int, stage: int) -> None:
    """Exhaustive: the sum of the others is exact, or the session ends and releases nothing."""
    mode = "malicious" if count >= 6 else "semi-honest"
    values = draw(count, 5, 20, seed=count)
    for size in range(count + 1):
        for gone in itertools.combinations(values, size):
            session = LocalSession.of(values, 20, mode=mode)

            def silence(
                at: str, node: int, message: Plain, gone: tuple[int, ...] = gone
            ) -> Plain | None:
                return None if STAGES[stage] == at and node in gone else message

            session.to_server = silence
            left = count - size
            # Quorum and thresholds follow from those who advertised.
            begun = left if stage == 0 else count
            needed = 2 * begun // 3 + 1 if mode == "malicious" else begun // 2 + 1
            needed = max(needed, 6 if mode == "malicious" and stage == 0 else 3)
            enough = left >= needed or (stage == 4 and left >= _threshold(begun, mode))
            if not enough:
                with pytest.raises(AbortedError) as caught:
                    session.run()
                assert {node for node, _ in caught.value.dropped} >= set(gone)
                assert caught.value.revealed == (stage == 4)
                continue
            released = session.run()
            out = set(values) - set(gone) if stage < 3 else set(values)
            assert set(released.included) == out
            assert released.total.tolist() == session.expected(released)
            assert {node for node, _ in released.dropped} == set(gone)


def _threshold(count: int, mode: str) -> int:
    return 2 * count // 3 + 1 if mode == "malicious" else count // 2 + 1


@given(st.lists(st.integers(0, 9), min_size=9, max_size=9))
@settings(deadline=None, max_examples=30)
def test_losses_at_different_stages_add_up(stages: list[int]) -> None:
    """Each node falls silent at a stage of its own (from 5 on: never)."""
    values = draw(9, 7, 20, seed=3)
    plan = dict(zip(values, stages, strict=True))
    session = LocalSession.of(values)
    session.to_server = lambda at, node, message: (
        None if STAGES.index(at) >= plan[node] else message
    )
    alive = [sum(s > stage for s in stages) for stage in range(5)]
    quorum = 2 * alive[0] // 3 + 1
    if alive[0] < 6 or min(alive) < quorum:
        with pytest.raises(AbortedError):
            session.run()
        return
    released = session.run()
    assert released.total.tolist() == session.expected(released)
    assert set(released.included) == {node for node in values if plan[node] > 2}


def test_the_next_round_works_after_one_that_was_given_up() -> None:
    """Flower's round dies of one loss before the shares, with a KeyError (defect S6)."""
    session = LocalSession.of(draw(6, 4, 20))
    session.to_server = lambda at, node, message: None if at == "mask" and node < 40 else message
    with pytest.raises(AbortedError, match="2 nodes sent a vector, 5 are needed") as caught:
        session.run()
    assert not caught.value.revealed
    after = session.again(round=2, nonce=b"2" * 16)
    released = after.run()
    assert released.included == tuple(session.values)
    assert released.total.tolist() == after.expected(released)


def test_one_node_s_bytes_on_the_wire_are_uniform() -> None:
    """Chi-squared over 256 values of the masked bytes of an all-zero vector, at 1e-7."""
    values = {node: np.zeros(400_000, "<u4") for node in range(1, 7)}
    session = LocalSession.of(values, 20)
    session.run()
    payload = session.wire["mask", 3]["vector"]
    assert isinstance(payload, bytes) and len(payload) == packing.packed_bytes(400_000, 20)
    counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
    mean = len(payload) / 256
    assert float(((counts - mean) ** 2 / mean).sum()) < 385.0  # 255 degrees: probability 2e-7


def test_nothing_of_a_vector_is_in_the_clear_on_the_wire() -> None:
    """The vector carries weight and metrics too (Flower sends those as they are, defect S8)."""
    marker = np.full(64, 0xABCDE, "<u4")
    session = LocalSession.of(dict.fromkeys(range(1, 7), marker), 20)
    session.run()
    plain = packing.pack(marker, 20)
    for reply in session.wire.values():
        for value in reply.values():
            raw = value if isinstance(value, bytes) else str(value).encode()
            assert plain[:16] not in raw and b"\xde\xbc\x0a" not in raw
    own = {"sealing", "masking", "own"}
    assert not own & {
        k for (stage, _), r in session.wire.items() if stage != "advertise" for k in r
    }


def test_two_sessions_of_one_node_share_no_key_and_no_mask() -> None:
    session = LocalSession.of(draw(6, 50, 20))
    session.run()
    other = session.again(nonce=b"n" * 16)
    other.run()
    for stage, name in (("advertise", "masking"), ("advertise", "sealing"), ("mask", "vector")):
        assert session.wire[stage, 5][name] != other.wire[stage, 5][name]


def test_secrets_are_erased_step_by_step() -> None:
    """Flower keeps all of them in the node's context, in the clear, for ever (defect S10)."""
    session = LocalSession.of(draw(6, 4, 20))
    kept: dict[str, set[str]] = {}

    def look(stage: str, node: int, message: Plain) -> Plain | None:
        kept[stage] = set(session.memory[node])
        return message

    session.to_server = look
    session.run()
    secret = {"values", "sealing", "masking", "own", "openers", "share"}
    assert {"values", "sealing", "masking"} <= kept["advertise"]
    assert "sealing" not in kept["share"]
    assert not secret & kept["mask"] and not secret & kept["agree"]
    assert kept["unmask"] == set()
    assert all(memory == {} for memory in session.memory.values())


def test_a_sparse_graph_of_110_nodes_with_losses() -> None:
    values = draw(110, 3, 20)
    session = LocalSession.of(values)
    gone = {node for i, node in enumerate(values) if i % 7 == 0}
    session.to_server = lambda at, node, message: (
        None if (at == "mask" and node in gone) or (at == "unmask" and node % 9 == 0) else message
    )
    released = session.run()
    assert set(released.included) == set(values) - gone
    assert released.total.tolist() == session.expected(released)
    sealed = session.wire["share", 5]["sealed"]
    degree = graph.degree(110)
    assert degree is not None and isinstance(sealed, bytes)
    assert len(sealed) == degree.neighbours * (4 + 66 + 16)


@pytest.mark.slow
def test_a_thousand_nodes() -> None:
    values = draw(1000, 20, 20)
    session = LocalSession.of(values)
    gone = set(list(values)[::10])
    session.to_server = lambda at, node, message: None if at == "mask" and node in gone else message
    released = session.run()
    assert len(released.included) == 900
    assert released.total.tolist() == session.expected(released)
