"""A disk under `--state` that fills up during a run: a sentence, and nothing is lost."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.small_federation import expected, lines, start_nodes, wait_for, weights


@pytest.fixture
def small_disk(federation: Any) -> Iterator[Any]:
    """The small federation, with a file system of its own under the coordinator's state."""
    federation.state.mkdir(mode=0o700)
    words = ("mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(federation.state))
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if done.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield federation
    finally:
        federation.close()
        subprocess.run(["umount", str(federation.state)], check=True)


def fill(file: Path) -> None:
    """Write until nothing more fits."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_server_with_a_sentence_and_costs_no_round(
    small_disk: Any,
) -> None:
    start_nodes(small_disk, "n1", "n2")
    options = "pause=0.2 size=100000"
    small_disk.server("-c", options)
    wait_for(small_disk, (small_disk.marks / "0-3").exists)
    fill(small_disk.state / "filler")
    assert small_disk.wait("server") == 1
    said = small_disk.log("server")
    assert "Traceback" not in said, said
    assert "cannot be written" in said.splitlines()[-1] and "make room" in said.splitlines()[-1]
    assert small_disk.result() == {}
    (small_disk.state / "filler").unlink()
    small_disk.server("-c", options)
    assert small_disk.wait("server") == 0, small_disk.log("server")
    result = small_disk.result()
    assert np.array_equal(weights(result), expected(small_disk, options="size=100000"))
    assert [line["round"] for line in lines(result) if line["round"]] == [*range(1, 11)]
