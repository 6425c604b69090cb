"""What every cluster is held against."""

import pytest

from tests.fakes import APPS, WarmCommand

OPTIONS = ("-c", "rounds=3", "--nodes", "6")
"""Of the run that all of them repeat."""


@pytest.fixture(scope="package")
def model(umbel: WarmCommand, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What worker processes of this machine make of the app."""
    folder = tmp_path_factory.mktemp("processes")
    out = folder / "run"
    done = umbel.command(
        "run",
        APPS / "slope",
        "--workers",
        "2",
        "--out",
        out,
        "-c",
        "rounds=3",
        "--nodes",
        "6",
        cwd=folder,
    )
    assert done.status == 0, done.err
    return (out / "model.safetensors").read_bytes()
