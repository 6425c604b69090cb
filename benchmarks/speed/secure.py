"""How fast a secure sum is, beside Flower's SecAgg+ primitives in the same run.

Every figure is a median of several measurements, in seconds of processor time of one core, so
that other work on the machine does not count. Nodes and server are the real ones: all five trips
are played in memory, and what one node and the server take is added up. Nothing that was checked
before is remembered while the measured nodes work, as if each had a process of its own.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.secure_link import TIMES_PLAIN, measure_link
from umbel.privacy.masking import masks, packing, shamir
from umbel.privacy.masking.session import forget_checked
from umbel.strategies.secure.local_session import STAGES, LocalSession
from umbel.strategies.secure.message import Plain

TARGETS: dict[str, float] = {
    "client_masking_s": 0.15,
    "client_s": 0.30,
    "server_s": 0.30,
    "server_with_losses_s": 2.0,
    "shamir_split_s": 1e-3,
    "mask_over_keystream": 1.5,
    "wire_over_bits": 1.01,
}
"""The largest values that count as reached, for 100 nodes and a million parameters."""


def measure(
    *, nodes: int = 100, size: int = 1_000_000, bits: int = 20, repeats: int = 7, losses: int = 10
) -> dict[str, Any]:
    """Secure sums among `nodes` nodes over a complete graph, and Flower's primitives.

    Args:
        nodes: of the cohort.
        size: parameters.
        bits: of the modulus.
        repeats: of every measurement of a primitive; nodes are measured this often too.
        losses: nodes that drop out after they have shared their secrets.

    Returns:
        Seconds by name (`..._s`), ratios, `targets`, and `reached` by target.
    """
    found: dict[str, Any] = {"nodes": nodes, "parameters": size, "bits": bits}
    found |= _primitives(nodes, size, bits, repeats)
    found |= _flower(nodes, size, repeats)
    whole = _play(nodes, size, bits, repeats)
    found["client_s"] = statistics.median(whole.client_s())
    found["server_s"] = whole.session.seconds["server"]
    found["wire_bytes"] = whole.wire_bytes
    found["wire_over_bits"] = whole.vector_bytes / (size * bits / 8)
    found["trips"] = len(STAGES)
    fewer = _play(nodes, size, bits, 1, lost=losses)
    found["losses"] = losses
    found["server_with_losses_s"] = fewer.session.seconds["server"]
    found["targets"] = TARGETS
    found["reached"] = {name: found[name] <= most for name, most in TARGETS.items()}
    return found


def median_s(work: Callable[[], object], repeats: int) -> float:
    """The median of the seconds that some work takes."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _primitives(nodes: int, size: int, bits: int, repeats: int) -> dict[str, float]:
    total = packing.empty_total(size, bits)
    keys = [os.urandom(32) for _ in range(nodes)]
    points = list(range(1, nodes + 1))
    threshold = 2 * nodes // 3 + 1
    shares = shamir.split(bytes(32), threshold, points)
    some = dict(list(zip(points, shares, strict=True))[:threshold])
    payload = packing.pack(total, bits)
    masking = _interleaved(
        lambda: masks.fold(total, plus=keys[::2], minus=keys[1::2]),
        lambda: _keystreams(keys, total.nbytes),
        repeats,
    )
    return {
        "client_masking_s": statistics.median(first for first, _ in masking),
        "keystream_s": statistics.median(second for _, second in masking),
        "mask_over_keystream": statistics.median(a / b for a, b in masking),
        "keystream_bytes_per_s": nodes
        * total.nbytes
        / statistics.median(second for _, second in masking),
        "pack_s": median_s(lambda: packing.pack(total, bits), repeats),
        "fold_packed_s": median_s(lambda: packing.add_packed(total, payload, bits), repeats),
        "shamir_split_s": median_s(lambda: shamir.split(bytes(32), threshold, points), 4 * repeats),
        "shamir_combine_s": median_s(lambda: shamir.combine(some), 4 * repeats),
    }


def _interleaved(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Both one after the other, so that a busy machine is busy for both."""
    return [(median_s(first, 1), median_s(second, 1)) for _ in range(repeats)]


def _keystreams(keys: list[bytes], length: int) -> None:
    """The bare AES-256-CTR keystream of every key, block by block into one buffer."""
    block = min(length, 1 << 17)
    zeros, buffer = memoryview(bytes(block)), bytearray(block + 15)
    for key in keys:
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        for start in range(0, length, block):
            stream.update_into(zeros[: min(block, length - start)], buffer)


def _flower(nodes: int, size: int, repeats: int) -> dict[str, float]:
    """The same primitives of the installed Flower; empty where it has none."""
    try:
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    except ImportError:
        return {}
    threshold = 2 * nodes // 3 + 1
    pem = os.urandom(306)  # of the length of the PEM key that Flower shares
    mask = median_s(lambda: pseudo_rand_gen(bytes(32), 1 << 20, [(size,)]), repeats)
    few = max(1, repeats // 2)
    return {
        "flower_mask_s": mask,
        "flower_client_masking_s": mask * nodes,
        "flower_shamir_split_s": median_s(
            lambda: create_shares(os.urandom(32), threshold, nodes), few
        ),
        "flower_shamir_split_pem_s": median_s(lambda: create_shares(pem, threshold, nodes), few),
        "flower_wire_over_bits": 8 * 8 / 20,
    }


def _play(nodes: int, size: int, bits: int, measured: int, lost: int = 0) -> "_Timed":
    values = np.random.default_rng(0).integers(0, 1 << bits, size).astype(masks.word(bits))
    session = LocalSession.of(dict.fromkeys(range(1, nodes + 1), values), bits)
    timed = _Timed(
        session,
        frozenset(range(1, min(measured, nodes) + 1)),
        frozenset(range(nodes - lost + 1, nodes + 1)),
    )
    session.to_node, session.to_server = timed.before, timed.after
    session.run()
    return timed


@dataclass
class _Timed:
    """A session in which some nodes are measured as if they were alone."""

    session: LocalSession
    measured: frozenset[int]
    lost: frozenset[int]
    by_stage: dict[tuple[str, int], float] = field(default_factory=dict)
    wire_bytes: int = 0
    vector_bytes: int = 0
    _began: float = 0.0

    def before(self, stage: str, node: int, message: Plain) -> Plain | None:
        if stage == "mask" and node in self.lost:
            return None
        if node in self.measured:
            forget_checked()
            self._began = time.process_time()
        return message

    def after(self, stage: str, node: int, message: Plain) -> Plain | None:
        if node in self.measured:
            self.by_stage[stage, node] = time.process_time() - self._began
        if node == 1:
            size = sum(len(value) for value in message.values() if isinstance(value, bytes | str))
            self.wire_bytes += size
            if stage == "mask":
                self.vector_bytes = len(message["vector"])  # type: ignore[arg-type]  # the field of a masked vector is bytes
        del self.session.wire[stage, node]  # a hundred vectors are not needed again
        return message

    def client_s(self) -> list[float]:
        """Seconds of every measured node, over all its messages."""
        return [
            sum(seconds for (_, node), seconds in self.by_stage.items() if node == one)
            for one in self.measured
        ]


def figures(*, quick: bool = False) -> list[Figure]:
    """The figures of `umbel bench speed --secure`; `quick` only shows that it works."""
    if quick:
        found = measure(nodes=7, size=10_000, repeats=2, losses=1)
    else:
        found = {**measure(), **measure_link()}
    times = [
        ("client: masking", "client_masking_s", {"Flower": "flower_client_masking_s"}),
        ("client: whole session", "client_s", {}),
        ("server: nobody lost", "server_s", {}),
        (f"server: {found['losses']} lost", "server_with_losses_s", {}),
        (
            "Shamir: 32 bytes among all",
            "shamir_split_s",
            {"Flower": "flower_shamir_split_s", "Flower's PEM": "flower_shamir_split_pem_s"},
        ),
        ("a mask", "mask_s", {"keystream": "keystream_one_s", "Flower": "flower_mask_s"}),
        (
            "link: round of 10 nodes",
            "link_round_s",
            {"plain sum": "link_plain_round_s", "bare gRPC": "link_bare_round_s"},
        ),
    ]
    found["mask_s"] = found["client_masking_s"] / found["nodes"]
    found["keystream_one_s"] = found["keystream_s"] / found["nodes"]
    targets = {} if quick else {**TARGETS, "link_over_plain": TIMES_PLAIN}
    made = [
        Figure(
            "secure",
            what,
            found[name] * 1e3,
            "ms",
            targets[name] * 1e3 if name in targets else None,
            {label: found[other] * 1e3 for label, other in beside.items() if other in found},
        )
        for what, name, beside in times
        if name in found
    ]
    ratios = (
        ("mask over keystream", "mask_over_keystream"),
        ("wire", "wire_over_bits"),
        ("link: secure over plain round", "link_over_plain"),
    )
    made += [
        Figure("secure", what, found[name], "x", targets.get(name))
        for what, name in ratios
        if name in found
    ]
    return made
