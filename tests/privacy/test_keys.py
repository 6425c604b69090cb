"""Keys: agreement in both directions, sealed for one place, signatures over one meaning."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from umbel.privacy.masking import keys

FIELDS = st.lists(st.binary(max_size=6) | st.text(max_size=6) | st.integers(-(2**70), 2**70))


@given(FIELDS, FIELDS)
def test_different_fields_never_give_the_same_transcript(
    first: list[bytes | str | int], second: list[bytes | str | int]
) -> None:
    same = keys.transcript("t", *first) == keys.transcript("t", *second)
    assert same == ([(type(x), x) for x in first] == [(type(x), x) for x in second])


def test_the_purpose_is_part_of_the_transcript() -> None:
    assert keys.transcript("a", b"b") != keys.transcript("b", b"b")
    assert keys.transcript("ab") != keys.transcript("a", "b")


def test_both_sides_agree_on_a_key_and_a_session_changes_it() -> None:
    """Flower derives with neither salt nor purpose (defect S5)."""
    one, two = keys.KeyPair.generate(), keys.KeyPair.generate()
    key = one.agree(two.public, b"session", b"mask")
    assert key == two.agree(one.public, b"session", b"mask")
    others = {
        one.agree(two.public, b"another", b"mask"),
        one.agree(two.public, b"session", b"seal"),
        one.agree(keys.KeyPair.generate().public, b"session", b"mask"),
    }
    assert len(others | {key}) == 4


def test_public_keys_that_force_a_known_secret_are_refused() -> None:
    for point in (bytes(32), (1).to_bytes(32, "little")):
        with pytest.raises(ValueError):
            keys.KeyPair.generate().agree(point, b"", b"")
    with pytest.raises(ValueError):
        keys.KeyPair.generate().agree(b"short", b"", b"")


def test_a_key_does_not_show_its_private_half() -> None:
    pair = keys.KeyPair.generate()
    assert pair.private.hex()[:12] not in repr(pair)
    assert keys.KeyPair.of(pair.private) == pair


@pytest.mark.parametrize("where", range(0, 40, 7))
def test_a_sealed_message_that_was_changed_does_not_open(where: int) -> None:
    sealed = keys.seal(b"k" * 32, b"twenty-four bytes inside", b"context")
    assert keys.unseal(b"k" * 32, sealed, b"context") == b"twenty-four bytes inside"
    changed = sealed[:where] + bytes([sealed[where] ^ 1]) + sealed[where + 1 :]
    for key, blob, context in (
        (b"k" * 32, changed, b"context"),
        (b"k" * 32, sealed[:where], b"context"),
        (b"k" * 32, sealed, b"another"),
        (b"l" * 32, sealed, b"context"),
    ):
        with pytest.raises(ValueError, match="sealed"):
            keys.unseal(key, blob, context)


@pytest.mark.parametrize(
    "key", [keys.signing_key(bytes(32)), ec.generate_private_key(ec.SECP256R1())]
)
def test_signatures_of_nodes_and_of_certificates(key: keys.SigningKey) -> None:
    identity = keys.public_identity(key)
    signature = keys.sign(key, b"message")
    assert keys.verify(identity, b"message", signature)
    assert not keys.verify(identity, b"another", signature)
    assert not keys.verify(identity, b"message", signature[:-1])
    assert not keys.verify(identity, b"message", b"")
    other = keys.public_identity(keys.signing_key(keys.new_signing_key()))
    assert not keys.verify(other, b"message", signature)


def test_identities_of_other_kinds_are_never_valid() -> None:
    weak = ec.generate_private_key(ec.SECP384R1())
    signature = keys.sign(weak, b"message")
    assert not keys.verify(keys.public_identity(weak), b"message", signature)
    assert not keys.verify(b"no key at all", b"message", signature)
