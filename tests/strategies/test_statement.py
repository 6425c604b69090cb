"""A node's signed statements: canonical, strict, and nobody else's."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from umbel.privacy.masking import keys
from umbel.strategies import statement as statements
from umbel.strategies.statement import RECORD, Signed, Statement, StatementError

KEY = keys.signing_key(bytes(range(32)))
ONE = Statement(
    node="7",
    unit="record",
    mechanism="dp-sgd",
    epsilon=1.25,
    run_epsilon=0.5,
    limit=3.0,
    delta=1e-5,
    relation="add-or-remove-one",
    noise_multiplier=1.1,
    sampling_rate=0.25,
    steps=4,
    norm=1.0,
    population="default",
    run="12",
    round=3,
    participations=3,
)


def test_it_comes_back_as_it_was_signed() -> None:
    content = RecordDict()
    first = statements.make(ONE, KEY)
    second = statements.make(replace(ONE, unit="node", previous=first.digest), KEY)
    statements.attach(content, [first, second])
    assert statements.read(content) == [first, second]
    assert first.statement() == ONE
    assert all(statements.verify(each) for each in (first, second))
    assert statements.verify(first, keys.public_identity(KEY))
    assert statements.read(RecordDict()) == []


@given(st.integers(0, 1 << 16), st.integers(1, 255))
def test_no_byte_of_it_can_be_changed(at: int, by: int) -> None:
    signed = statements.make(ONE, KEY)
    body = bytearray(signed.body)
    body[at % len(body)] ^= by
    assert not statements.verify(replace(signed, body=bytes(body)))


def test_another_key_does_not_pass_for_the_nodes() -> None:
    other = keys.signing_key(bytes(32))
    forged = statements.make(ONE, other)
    assert statements.verify(forged)  # it is somebody's, and says whose
    assert not statements.verify(forged, keys.public_identity(KEY))
    assert not statements.verify(replace(forged, key=keys.public_identity(KEY)))
    unsigned = statements.make(ONE, None)
    assert not unsigned.is_signed
    assert not statements.verify(unsigned)


def test_an_unbounded_epsilon_is_null() -> None:
    signed = statements.make(replace(ONE, epsilon=None, run_epsilon=None, limit=None), KEY)
    assert json.loads(signed.body)["epsilon"] is None
    assert signed.statement().epsilon is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", math.inf),
        ("epsilon", -1.0),
        ("epsilon", True),
        ("unit", "patient"),
        ("relation", "any"),
        ("delta", 0.0),
        ("delta", math.nan),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("steps", 0),
        ("steps", 2.0),
        ("round", -1),
        ("participations", 0),
        ("previous", "abc"),
        ("version", 2),
        ("node", 7),
    ],
)
def test_values_that_cannot_be(name: str, value: Any) -> None:
    wrong = replace(ONE, **{name: value})
    with pytest.raises(StatementError, match=name.replace("_", "-")):
        statements.make(wrong, KEY)
    plain = json.loads(ONE.canonical()) | {name.replace("_", "-"): value}
    body = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(StatementError):
        statements.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 9000,
        ONE.canonical() + b" ",
        ONE.canonical().replace(b'"delta":1e-05', b'"delta":0.00001'),
        ONE.canonical().replace(b'"run"', b'"ruin"'),
        ONE.canonical().replace(b'"delta"', b'"delta":1e-09,"delta"'),
        b" " * (1 << 15),
    ],
)
def test_only_canonical_bytes_are_read(body: bytes) -> None:
    with pytest.raises(StatementError):
        statements.parse(body)


@pytest.mark.parametrize(
    "record",
    [
        {"statement": ONE.canonical(), "signature": b"", "key": "text"},
        {"statement": ONE.canonical(), "signature": b""},
        {"statement": ONE.canonical(), "signature": b"", "key": b"", "more": 1},
        {"statement": b"{}", "signature": b"", "key": b""},
    ],
)
def test_a_record_of_another_form_is_refused(record: Any) -> None:
    with pytest.raises(StatementError):
        statements.read(RecordDict({RECORD: ConfigRecord(record)}))


def test_the_next_one_names_the_one_before() -> None:
    first = Signed(ONE.canonical())
    assert replace(ONE, previous=first.digest).canonical() != first.body
