"""Writes simulated records of four wards as Parquet: python write.py FOLDER"""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.dataset

WARDS = ("east", "north", "south", "west")
ROWS = 40_000

generator = np.random.default_rng(0)
age = generator.uniform(18, 95, ROWS)
severity = generator.integers(0, 5, ROWS)
emergency = generator.random(ROWS) < 0.3
score = 0.04 * (age - 60) + 0.9 * (severity - 2) + 1.2 * emergency - 0.3
stays = generator.random(ROWS) < 1 / (1 + np.exp(-2 * score))
records = pa.table(
    {
        "age": age.astype(np.float32),
        "severity": severity.astype(np.int8),
        "emergency": emergency,
        "long": np.where(stays, "yes", "no"),
        "ward": np.asarray(WARDS)[generator.choice(4, ROWS, p=(0.4, 0.3, 0.2, 0.1))],
    }
)
pyarrow.dataset.write_dataset(
    records,
    sys.argv[1],
    format="parquet",
    partitioning=["ward"],
    partitioning_flavor="hive",
    max_rows_per_group=1024,
)
