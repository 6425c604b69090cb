"""What virtual nodes are like as devices: from a table, or drawn from a distribution."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umbel.core.errors import ConfigError
from umbel.strategies.device_options import DeviceOptions

COLUMNS = ("partition", "seconds", "download_mbit", "upload_mbit", "latency")
NEEDED = ("partition", "seconds")
BYTES_PER_MBIT = 1e6 / 8
_STREAM = 11
"""Sets these draws apart from others of the same seed."""


@dataclass(frozen=True)
class Device:
    """How long what a node does takes.

    Attributes:
        seconds: of a training.
        download: bytes a second to it.
        upload: bytes a second from it.
        latency: seconds of a message on its way, beside its bytes.
    """

    seconds: float
    download: float = math.inf
    upload: float = math.inf
    latency: float = 0.0

    def until_trained(self, received: int, *, trains: bool) -> float:
        """Seconds from when a message is sent until the node could begin to answer.

        Args:
            received: bytes of the message.
            trains: whether it asks for a training; whatever else is asked takes no time itself.
        """
        return self.latency + received / self.download + (self.seconds if trains else 0.0)

    def to_send(self, sent: int) -> float:
        """Seconds that so many bytes of an answer are on their way."""
        return self.latency + sent / self.upload


def devices_of(options: DeviceOptions, nodes: int, seed: int) -> list[Device]:
    """The device of each partition.

    Args:
        options: how they are made.
        nodes: how many.
        seed: of the run; the same seed gives the same devices.

    Raises:
        ConfigError: a table that cannot be read, lacks a partition or has an impossible number.
    """
    if options.table:
        return _read(Path(options.devices).expanduser(), nodes)
    draws = np.random.default_rng([seed, _STREAM]).standard_normal((nodes, 2))
    factors = np.exp(draws * (options.device_spread if options.devices == "lognormal" else 0.0))
    down, up = (
        mbit * BYTES_PER_MBIT or math.inf
        for mbit in (options.device_download_mbit, options.device_upload_mbit)
    )
    return [
        Device(options.device_seconds * float(slow), down / float(thin), up / float(thin))
        for slow, thin in factors
    ]


def _read(file: Path, nodes: int) -> list[Device]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the table of devices {file} cannot be read: {error}") from error
    known = set(rows[0]) if rows else set()
    if not set(NEEDED) <= known or not known <= set(COLUMNS):
        raise ConfigError(
            f"the table of devices {file} has the columns {', '.join(sorted(map(str, known)))}; "
            f"give {', '.join(NEEDED)} and, where they are known, {', '.join(COLUMNS[2:])}"
        )
    found: dict[int, Device] = {}
    for line, row in enumerate(rows, 2):
        where = f"line {line} of {file}"
        partition = _number(row, "partition", where)
        if partition != int(partition) or int(partition) in found:
            raise ConfigError(f"{where}: partition is {row['partition']}; give each node once")
        found[int(partition)] = _device(row, where)
    missing = [node for node in range(nodes) if node not in found]
    if missing:
        raise ConfigError(
            f"the table of devices {file} lacks partition {missing[0]} of the {nodes} nodes; add a "
            "line for it"
        )
    return [found[node] for node in range(nodes)]


def _device(row: Mapping[str, str | None], where: str) -> Device:
    links = []
    for name in ("download_mbit", "upload_mbit"):
        mbit = _number(row, name, where) if row.get(name) else math.inf
        if mbit <= 0:
            raise ConfigError(f"{where}: {name} is {mbit:g}; it must be above 0, or left empty")
        links.append(mbit * BYTES_PER_MBIT)
    seconds = _number(row, "seconds", where)
    if seconds <= 0:
        raise ConfigError(f"{where}: seconds is {seconds:g}; a training takes some time: above 0")
    latency = _number(row, "latency", where) if row.get("latency") else 0.0
    download, upload = links
    return Device(seconds, download, upload, latency)


def _number(row: Mapping[str, str | None], name: str, where: str) -> float:
    text = row[name] or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{where}: {name} is {text!r}; give a number that is not negative")
    return value
