"""The run directory: everything that a run leaves behind, and how it is written safely.

    runs/<run-id>/
        config.json        what was asked for, versions and machine: enough to repeat the run
        metrics.jsonl      one JSON object a round, appended as the round ends
        nodes.jsonl        per-node metrics of the last federated evaluation
        result.json        what `umbel run --json` prints
        model.safetensors  the trained model
        statements.jsonl   what nodes have signed of their own budgets
        checkpoint/ log.txt ledger.sqlite certificate.json seal.json report.html *.png

Whole files are replaced in one step, so a reader sees the old or the new one and never half of
one. `metrics.jsonl` only grows; a line that a kill cut short is ignored by readers and removed
by the next write. All of it is strict JSON; infinity is the text `"Infinity"` there
(`umbel.server.output.strict`).
"""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from umbel.core.errors import ConfigError, RunError, UmbelError
from umbel.server.output import strict

LOCK = ".lock"
"""In a run's directory: who is at work on it holds this file locked."""
_PACKAGES = (
    *("umbel", "flwr", "torch", "numpy", "scikit-learn", "dp-accounting", "grpcio"),
    # and where they are installed:
    *("keras", "tensorflow", "jax", "flax", "optax", "transformers", "peft"),
)


@dataclass(frozen=True)
class RunDirectory:
    """A directory that holds one run.

    Attributes:
        path: the directory itself.
    """

    path: Path

    @classmethod
    def create(
        cls, parent: Path | None, name: str, config: Mapping[str, Any], *, out: Path | None = None
    ) -> "RunDirectory":
        """Make a directory for a new run and write its `config.json`.

        Args:
            parent: where runs are kept; None is `runs` in the current directory.
            name: the app's name; it becomes part of the run's id, which is
                `<UTC time>-<name>-<four random hex digits>`.
            config: what `config.json` shall hold; `started` is added where it is missing.
            out: use exactly this directory instead of an id under `parent`.

        Raises:
            ConfigError: the directory holds a run already, holds other files, or cannot be
                written.
        """
        path = out if out is not None else (parent or Path("runs")) / _run_id(name)
        run = cls(path)
        if run.holds_run():
            raise ConfigError(
                f"{path} already holds a run; choose another directory with --out, "
                f"or continue that run with --resume {path}."
            )
        with _writing(path, ConfigError):
            path.mkdir(parents=True, exist_ok=True)
            if any(not file.name.startswith(".") for file in path.iterdir()):
                raise ConfigError(
                    f"{path} holds other files and no run; name a new or an empty folder with --out"
                )
        started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        _replace_json(run.config_path, {**started, **config}, ConfigError, strict.dumps_options)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """The run at `path`; nothing on disk changes.

        Raises:
            ConfigError: there is no run at `path`.
        """
        run = cls(path)
        if not run.holds_run():
            what = "is not a run directory" if path.is_dir() else "is not a directory"
            raise ConfigError(
                f"{path} {what} (no config.json in it); give the directory that `umbel run` "
                "printed, such as runs/<run-id>."
            )
        return run

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file() or self.metrics_path.is_file()

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def nodes_path(self) -> Path:
        return self.path / "nodes.jsonl"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def model_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def certificate_path(self) -> Path:
        return self.path / "certificate.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def config(self) -> dict[str, Any]:
        """What `config.json` holds; empty where there is none."""
        return _read_object(self.config_path)

    def result(self) -> dict[str, Any]:
        """What `result.json` holds; empty while the run has not ended."""
        return _read_object(self.result_path)

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds so far, in order; a last line that was cut short is left out.

        Raises:
            ConfigError: a line other than the last is no JSON object.
        """
        return _read_lines(self.metrics_path)

    def nodes(self) -> list[dict[str, Any]]:
        """Per-node metrics of the last federated evaluation; empty where there was none."""
        return _read_lines(self.nodes_path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.json`."""
        _replace_json(self.config_path, config, write=strict.dumps_options)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace `result.json`."""
        _replace_json(self.result_path, result)

    def write_nodes(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Replace `nodes.jsonl` with one line for each node."""
        _replace_lines(self.nodes_path, nodes)

    def write_lines(self, name: str, values: Iterable[Mapping[str, Any]]) -> Path:
        """Replace the file `name` in this directory with one JSON object a line."""
        path = self.path / name
        _replace_lines(path, values)
        return path

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Replace the file `name` in this directory with one JSON object."""
        path = self.path / name
        _replace_json(path, value)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Replace the file `name` in this directory with `content`."""
        path = self.path / name
        _replace(path, lambda fresh: _fill(fresh, content))
        return path

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Add one round to `metrics.jsonl`; it survives a kill of this process right after.

        Raises:
            RunError: the line cannot be written.
        """
        text = strict.dumps(line).encode() + b"\n"
        with _writing(self.metrics_path), self.metrics_path.open("ab+") as file:
            _repair(file.fileno())
            file.write(text)
            file.flush()

    def truncate_rounds(self, after_round: int) -> None:
        """Forget every round later than `after_round`, as a resumed run must."""
        kept = [line for line in self.rounds() if int(line.get("round", 0)) <= after_round]
        _replace_lines(self.metrics_path, kept)

    def write_model(
        self,
        tensors: Mapping[str, Tensor | np.ndarray[Any, Any]],
        description: Mapping[str, str] | None = None,
    ) -> Path:
        """Replace `model.safetensors`.

        Args:
            tensors: names to values; they may be views of one vector.
            description: names to texts, kept in the file's header.

        Returns:
            The file's path.

        Raises:
            RunError: the file cannot be written.
        """

        def save(path: Path) -> None:
            try:
                plain, pairs = _storable(_separate(tensors))
                about = {**(description or {}), **({PAIRS: json.dumps(pairs)} if pairs else {})}
                save_file(plain, path, metadata=about)
            except SafetensorError as error:  # safetensors wraps the operating system's error
                raise OSError(str(error)) from error

        _replace(self.model_path, save)
        return self.model_path

    def read_model(self) -> dict[str, Tensor]:
        """The tensors of `model.safetensors`.

        Raises:
            ConfigError: there is no model, or the file is damaged.
        """
        try:
            found = dict(load_file(self.model_path))
            with safe_open(self.model_path, "pt") as file:
                pairs = json.loads((file.metadata() or {}).get(PAIRS, "[]"))
            return found | {name: torch.view_as_complex(found[name]) for name in pairs}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.model_path} cannot be read as a model: {error}.") from error


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """This machine: usable `cpus`, `memory_gb` (1e9 bytes), `gpu` (text or None), `platform`."""
    # Never by torch.cuda: asking it would start CUDA here and spoil it for forked workers.
    affinity = getattr(os, "sched_getaffinity", None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpu": _gpu(),
        "platform": platform.platform(),
    }


def _gpu() -> str | None:
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    counted = {name: names.count(name) for name in names}
    return ", ".join(f"{count} × {name}" for name, count in counted.items()) or None


def _run_id(name: str) -> str:
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return "-".join(part for part in (time, slug, secrets.token_hex(2)) if part)


@contextmanager
def _writing(path: Path, error: type[UmbelError] = RunError) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise error(
            f"{path} cannot be written ({problem.strerror or problem}); make room or change its "
            "permissions, or choose another directory with --out."
        ) from problem


def _replace(path: Path, write: Callable[[Path], None], error: type[UmbelError] = RunError) -> None:
    """Let `write` fill a file beside `path`, then put it in the place of `path` in one step."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path, error):
        try:
            write(fresh)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def _replace_json(
    path: Path,
    value: Mapping[str, Any],
    error: type[UmbelError] = RunError,
    write: Callable[..., str] = strict.dumps,
) -> None:
    text = write(value, indent=2) + "\n"
    _replace(path, lambda fresh: _fill(fresh, text.encode()), error)


def _replace_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(strict.dumps(value) + "\n" for value in values)
    _replace(path, lambda fresh: _fill(fresh, text.encode()))


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = strict.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__} where an object was expected.")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        value = _object(line)
        if value is not None:
            found.append(value)
        elif number < len(lines) - 1:  # the last one, without a line feed, was cut short
            raise ConfigError(
                f"{path}, line {number + 1}, is no JSON object; remove or restore that line."
            )
    return found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = strict.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _repair(descriptor: int) -> None:
    """Make the file end with a whole line: finish the last one or cut it off."""
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    content = os.pread(descriptor, end, 0)
    start = content.rfind(b"\n") + 1
    if _object(content[start:]) is None:
        os.ftruncate(descriptor, start)
    else:
        os.write(descriptor, b"\n")


def _separate(tensors: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Tensors on the CPU of which no two share memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        array = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        array = array.detach().cpu().contiguous()
        storage = array.untyped_storage().data_ptr()
        result[name] = array.clone() if storage in seen else array
        seen.add(storage)
    return result


PAIRS = "complex128"
"""In the file's header: names of the tensors that are kept as pairs of real numbers."""


def _storable(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of types that safetensors has; complex128 as pairs, and whose those are."""
    pairs = [name for name, value in tensors.items() if value.dtype == torch.complex128]
    views = {name: torch.view_as_real(tensors[name]) for name in pairs}
    return {**tensors, **views}, pairs
