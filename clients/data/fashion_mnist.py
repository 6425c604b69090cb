"""Fashion-MNIST on this machine: found or fetched once, then mapped into memory.

    cache/*.npy  ->  files placed by hand  ->  /usr/share/datasets  ->  apt-get  ->  HTTPS
    |                `------------------- checked against SHA-256, stored ----------------'
    `-> np.load(mmap_mode="r"): the processes of one machine share the pages

The images are those of Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms" (2017), https://arxiv.org/abs/1708.07747.
"""

import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from umbel.core.errors import ConfigError

Array = np.ndarray[Any, np.dtype[np.uint8]]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, from 0 to 1."""

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
TIMEOUT_S = 8  # without a byte
CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class File:
    """One of the four files.

    Attributes:
        idx: its name upstream, without `.gz`.
        shape: of the array in it.
        sha256: of the idx file itself, since each publisher compresses it differently.
        size: bytes of the compressed file, about, for progress.
    """

    idx: str
    shape: tuple[int, ...]
    sha256: str
    size: int

    @property
    def header(self) -> bytes:
        """The first bytes of the idx file: two zeros, unsigned bytes, the sizes of the axes."""
        axes = b"".join(length.to_bytes(4, "big") for length in self.shape)
        return bytes([0, 0, 8, len(self.shape)]) + axes


FILES = {
    "train-images": File(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        26_421_880,
    ),
    "train-labels": File(
        "train-labels-idx1-ubyte",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        29_515,
    ),
    "test-images": File(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        4_422_102,
    ),
    "test-labels": File(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        5_148,
    ),
}


class SourceError(Exception):
    """One source could not give the files; the next is tried."""


Source = Callable[[Path, Progress], Path]
"""Given an empty folder to work in, finds or fetches the idx files and names their folder."""


def cached(folder: Path) -> dict[str, Array] | None:
    """The four arrays mapped from `folder`; None if one is missing or cut short."""
    arrays: dict[str, Array] = {}
    for name, file in FILES.items():
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if array.shape != file.shape or array.dtype != np.uint8:
            return None
        arrays[name] = array
    return arrays


def damaged(folder: Path) -> list[str]:
    """The cached files of `folder` whose contents are not what was published."""
    arrays = cached(folder)
    if arrays is None:
        return [f"{name}.npy" for name in FILES]
    return [
        f"{name}.npy"
        for name, file in FILES.items()
        if _digest(file.header, np.ascontiguousarray(arrays[name]).data) != file.sha256
    ]


def ensure(folder: Path, progress: Progress) -> dict[str, Array]:
    """The four arrays mapped from `folder`, which is filled first where it is not.

    Processes that come together wait for the one that fetches.

    Raises:
        ConfigError: no source has the files, or `folder` cannot be written.
    """
    arrays = cached(folder)
    if arrays is not None:
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if cached(folder) is None:
                _fill(folder, progress)
    except OSError as error:
        raise ConfigError(
            f"the data cache {folder} cannot be written ({error.strerror or error}); "
            "set UMBEL_CACHE to a folder that can"
        ) from error
    arrays = cached(folder)
    if arrays is None:
        raise ConfigError(f"the data cache {folder} was changed while it was filled; try again")
    return arrays


def repair(folder: Path, progress: Progress) -> None:
    """`ensure`, then compare all contents with what was published and fetch again if they differ.

    Raises:
        ConfigError: as `ensure`.
    """
    ensure(folder, progress)
    progress("checking", 0.0)
    bad = damaged(folder)
    for name in bad:
        (folder / name).unlink(missing_ok=True)
    if bad:
        ensure(folder, progress)
    progress("checking", 1.0)


def sources(folder: Path) -> dict[str, Source]:
    """Where the files may come from, in the order in which they are tried."""
    found: dict[str, Source] = {
        str(folder): partial(_placed, folder),
        str(SYSTEM): partial(_placed, SYSTEM),
    }
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        found["apt-get"] = _from_apt
    return found | {mirror.split("/")[2]: partial(_from_web, mirror) for mirror in MIRRORS}


def _fill(folder: Path, progress: Progress) -> None:
    reasons = []
    for name, source in sources(folder).items():
        with tempfile.TemporaryDirectory(prefix="umbel-") as scratch:
            try:
                found = source(Path(scratch), progress)
                contents = {key: _read(found, file) for key, file in FILES.items()}
            except SourceError as error:
                if str(error):  # an empty folder explains nothing
                    reasons.append(f"{name}: {error}")
                continue
        for key, content in contents.items():
            file = FILES[key]
            array = np.frombuffer(content, np.uint8, offset=len(file.header)).reshape(file.shape)
            _store(array, folder / f"{key}.npy")
        return
    names = ", ".join(f"{file.idx}.gz" for file in FILES.values())
    raise ConfigError(
        f"fashion-mnist is not on this machine and could not be fetched ({'; '.join(reasons)}); "
        f"copy {names} from a machine that has them into {folder}, "
        f"or install the Debian package {PACKAGE}"
    )


def _read(folder: Path, file: File) -> bytes:
    """The checked contents of one idx file, compressed or not."""
    compressed, plain = folder / f"{file.idx}.gz", folder / file.idx
    try:
        content = (
            gzip.decompress(compressed.read_bytes()) if compressed.exists() else plain.read_bytes()
        )
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{file.idx} cannot be read ({error})") from error
    if (digest := _digest(content)) != file.sha256:
        raise SourceError(
            f"{file.idx} is damaged: its SHA-256 is {digest[:12]}…, not {file.sha256[:12]}…"
        )
    return content


def _store(array: Array, path: Path) -> None:
    """Write beside and rename, so that no reader ever sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        Path(name).chmod(0o644)  # mkstemp gives 0600, and a cache may be shared
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _placed(folder: Path, scratch: Path, progress: Progress) -> Path:  # noqa: ARG001
    missing = [
        file.idx
        for file in FILES.values()
        if not (folder / f"{file.idx}.gz").exists() and not (folder / file.idx).exists()
    ]
    if missing:
        raise SourceError("" if len(missing) == len(FILES) else f"{missing[0]} is missing")
    return folder


def _from_apt(scratch: Path, progress: Progress) -> Path:
    """Download the distribution's package and unpack it, without root and without installing."""
    options = ["-qq", f"-oAcquire::http::Timeout={TIMEOUT_S}", "-oAcquire::Retries=0"]
    try:
        _apt([*options, "download", PACKAGE], scratch, progress)
    except SourceError as first:
        # Other lists help against an unknown or moved package, not against a dead network.
        if "Failed to fetch" in str(first) and "404" not in str(first):
            raise
        try:
            _apt_with_own_lists(options, scratch, progress)
        except SourceError:
            raise first from None
    packages = list(scratch.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise SourceError(f"apt-get found no package {PACKAGE}")
    unpacked = subprocess.run(
        ["dpkg-deb", "-x", str(packages[0]), str(scratch / "unpacked")],
        capture_output=True,
        text=True,
        check=False,
    )
    if unpacked.returncode:
        raise SourceError(_last_line(unpacked.stderr) or "dpkg-deb failed")
    return scratch / "unpacked" / SYSTEM.relative_to("/")


def _apt_with_own_lists(options: list[str], scratch: Path, progress: Progress) -> None:
    """For a machine whose package lists are missing or old: fetch a private copy first."""
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "cache").mkdir()
    scratch.chmod(0o755)  # for root, apt reads its lists as another user
    options = [*options, f"-oDir::State::Lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
    _apt([*options, "-oAcquire::Languages=none", "update"], scratch, progress)
    _apt([*options, "download", PACKAGE], scratch, progress)


def _apt(arguments: list[str], scratch: Path, progress: Progress) -> None:
    doing = f"apt-get {arguments[-2] if arguments[-1] == PACKAGE else arguments[-1]}"
    progress(doing, 0.0)
    with (
        (scratch / "errors").open("w+") as errors,
        subprocess.Popen(
            ["apt-get", "-oAPT::Status-Fd=1", *arguments],
            cwd=scratch,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        for line in process.stdout or ():
            kind, _, rest = line.partition(":")
            if kind == "dlstatus":
                progress(doing, float(rest.split(":")[1]) / 100)
        status = process.wait()
        errors.seek(0)
        reason = _last_line(errors.read())
    if status:
        raise SourceError(reason or f"{doing} failed")


def _from_web(mirror: str, scratch: Path, progress: Progress) -> Path:
    """Download the four compressed files."""
    done, total = 0, sum(file.size for file in FILES.values())
    doing = f"downloading from {mirror.split('/')[2]}"
    progress(doing, 0.0)
    for file in FILES.values():
        request = urllib.request.Request(f"{mirror}{file.idx}.gz", headers={"User-Agent": "umbel"})
        try:
            with (
                urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
                (scratch / f"{file.idx}.gz").open("wb") as copy,
            ):
                while chunk := response.read(CHUNK):
                    copy.write(chunk)
                    done += len(chunk)
                    progress(doing, min(done / total, 1.0))
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            raise SourceError(str(getattr(error, "reason", None) or error)) from error
    return scratch


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E:")] or text.splitlines()
    return lines[-1].removeprefix("E:").strip() if lines else ""


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
