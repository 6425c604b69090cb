"""What it costs to train on Parquet: the loader beside Arrow's own scan, and the memory of a run.

The file is made by the benchmark: 50 columns of float32, random, so that nothing compresses them, a
user and a label; row groups of 131,072 rows. Both read the same columns of the same file, which the
operating system has cached by then. The loader's batches are mixed, and are arrays; the scan leaves
its columns where they are, and does nothing with them.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.apps import write_federation
from umbel.benchmarks.speed.processes import watch
from umbel.clients.at_rest.places import arrow
from umbel.clients.at_rest.rows import StoredRows
from umbel.clients.at_rest.stored import Parquet
from umbel.clients.data.examples import Node

COLUMNS = tuple(f"f{number:02}" for number in range(50))
GROUP = 131_072
SIZE = 4 << 30
"""Bytes of the file."""
QUICK = 100 << 20
USERS = 4
BATCH = 4096
RATIO = 1 / 0.7
"""The most seconds of the loader, in those of the scan."""
GIGABYTES = 1.5
"""The most memory of a run with two worker processes."""
ROUNDS = 3

_TASK = """\
from torch import nn

from umbel import Federation, Parquet, TorchTrainer

federation = Federation(
    trainer=TorchTrainer(lambda: nn.Linear(50, 2), batch_size={batch}, local_epochs=1),
    data=Parquet({file!r}, y="y", by="user"),
)
"""


def measure(*, quick: bool = False, size: int = SIZE) -> list[Figure]:
    """Seconds of the loader and of the scan, and the memory of a run.

    Args:
        quick: a small file and one repeat: a check that it works, not a measurement.
        size: bytes of the file.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    size = QUICK if quick else size
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "rows.parquet"
        write(file, size)
        loader, scan = _in_turns(lambda: load(file), lambda: scanned(file), 1 if quick else 3)
        name = f"{file.stat().st_size / 1e9:.1f} GB of Parquet"
        app = write_federation(
            Path(where) / "app",
            _TASK.format(file=str(file), batch=BATCH),
            name="rows",
            config=f"rounds = {ROUNDS}\nclient-eval-every = -1",
        )
        command = [
            *(sys.executable, "-P", "-c", "from umbel.commands.cli import main; main()"),
            *("run", str(app), "--nodes", str(USERS), "--workers", "2"),
        ]
        seen = watch(command, app, memory=True)
    return [
        Figure(
            "data",
            f"read {name} in mixed batches, over Arrow's scan",
            loader / scan,
            "times",
            RATIO,
            {"loader in s": loader, "scan in s": scan},
        ),
        Figure(
            "data",
            f"train on {name}, two workers: memory of all processes",
            seen.peak_bytes / 1e9,
            "GB",
            GIGABYTES,
            {"seconds a round": seen.round_s},
        ),
    ]


def write(file: Path, size: int) -> None:
    """Make the file, sorted by user."""
    pa, parquet = arrow(), arrow("parquet")
    generator = np.random.default_rng(0)
    number = pa.float32()
    fields = [("user", pa.int32()), *((name, number) for name in COLUMNS), ("y", pa.int64())]
    groups = max(USERS, size // (GROUP * 4 * len(COLUMNS)))
    with parquet.ParquetWriter(file, pa.schema(fields)) as writer:
        for place in range(groups):
            values = generator.standard_normal((len(COLUMNS), GROUP), np.float32)
            columns: list[Any] = [np.full(GROUP, place * USERS // groups, np.int32), *values]
            columns.append((values[0] > 0).astype(np.int64))
            table = pa.table([pa.array(one) for one in columns], schema=pa.schema(fields))
            writer.write_table(table, row_group_size=GROUP)


def load(file: Path) -> int:
    """All rows in mixed batches; how many there were."""
    rows = Parquet(file, x=COLUMNS, y="y")(Node(0, 1, {}), {}).train
    if not isinstance(rows, StoredRows):
        return len(rows)
    return sum(len(batch) for batch in rows.batches(BATCH, 0))


def scanned(file: Path) -> int:
    """All rows as Arrow's own scan gives them; how many there were."""
    stored = arrow("dataset").dataset(file)
    batches = stored.to_batches(columns=[*COLUMNS, "y"])
    return sum(batch.num_rows for batch in batches)


def _in_turns(
    one: Callable[[], int], other: Callable[[], int], repeats: int
) -> tuple[float, float]:
    """Median seconds of each, after a turn that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        counts = []
        for place, work in enumerate((one, other)):
            began = time.perf_counter()
            counts.append(work())
            if turn:
                seconds[place].append(time.perf_counter() - began)
        assert counts[0] == counts[1]
    return statistics.median(seconds[0]), statistics.median(seconds[1])
