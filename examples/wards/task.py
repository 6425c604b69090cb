"""Four wards predict length of stay from records that lie as Parquet; each reads only its own.

    python write.py wards-data      writes 40,000 simulated records, a folder for each ward
    umbel run . --nodes 4

WARDS_DATA names another place: a folder, s3://bucket/wards, webhdfs://host:9870/wards.
"""

import os

from torch import nn

from umbel import Examples, Federation, Parquet, TorchTrainer

PLACE = os.environ.get("WARDS_DATA", "wards-data")
INPUTS = ("age", "severity", "emergency")


def scaled(rows: Examples) -> Examples:
    """Public ranges, so that nobody's records are looked at for them."""
    return Examples((rows.x - (50, 2, 0)) / (20, 1, 1), rows.y)


federation = Federation(
    trainer=TorchTrainer(
        lambda: nn.Linear(len(INPUTS), 2), batch_size=100, local_epochs=1, learning_rate=0.1
    ),
    data=Parquet(
        PLACE,
        x=INPUTS,
        y="long",
        by="ward",
        classes=("no", "yes"),
        test_fraction=0.2,
        transform=scaled,
        memory=1 << 18,  # so small that the records are streamed
    ),
)
