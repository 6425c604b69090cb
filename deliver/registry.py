"""Which models there are, which of them are in use, and where each comes from.

    REGISTRY/                        $UMBEL_REGISTRY, else umbel/registry in the data folder
        MODEL/
            versions/N.json          lineage of version N: run, app digest, population, certificate
            tags.json                {"production": 3}

Files only, each replaced in one step. The words are those of MLflow's registry (model, version,
alias), so that a few lines can mirror it there.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def home() -> Path:
    """The registry's folder."""
    if chosen := os.environ.get("UMBEL_REGISTRY"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_DATA_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path("~/.local/share").expanduser()
    return base / "umbel" / "registry"


@dataclass(frozen=True)
class Version:
    """A registered model.

    Attributes:
        model: its name.
        number: from 1.
        path: the folder of the delivered model, or of the run.
        lineage: run, app, app_digest, sha256, form, populations, certificate, metrics.
        tags: that point to it.
    """

    model: str
    number: int
    path: Path
    lineage: Mapping[str, Any]
    tags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `umbel registry list --json`."""
        return {
            "model": self.model,
            "version": self.number,
            "path": str(self.path),
            "tags": list(self.tags),
            **dict(self.lineage),
        }


def add(model: str, path: Path, lineage: Mapping[str, Any]) -> Version:
    """Register a model as the next version of its name; the same file again is the same version.

    Raises:
        ConfigError: the name cannot be one, or the registry cannot be written.
    """
    _named(model, "model")
    for known in versions(model):
        if known.path == path and known.lineage.get("sha256") == lineage.get("sha256"):
            return known
    folder = home() / model / "versions"
    body = {
        "path": str(path),
        "registered": datetime.now(UTC).isoformat(timespec="seconds"),
        **dict(lineage),
    }
    text = json.dumps(body, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(file.stem) for file in folder.glob("*.json")), default=0) + 1
        while True:
            with suppress(FileExistsError), (folder / f"{number}.json").open("x") as file:
                file.write(text)
                return Version(model, number, path, body)
            number += 1  # another process took it
    except OSError as error:
        raise ConfigError(
            f"the registry {home()} cannot be written ({error.strerror}); name another folder "
            "with UMBEL_REGISTRY"
        ) from error


def versions(model: str) -> list[Version]:
    """All versions of a model, oldest first."""
    folder = home() / model / "versions"
    tags = _tags(model)
    found = []
    for file in sorted(folder.glob("*.json"), key=lambda file: int(file.stem)):
        body = _read(file)
        number = int(file.stem)
        own = tuple(sorted(tag for tag, which in tags.items() if which == number))
        found.append(Version(model, number, Path(body.pop("path")), body, own))
    return found


def models() -> list[str]:
    """The names of all models."""
    return sorted(folder.name for folder in home().glob("*") if (folder / "versions").is_dir())


def tag(model: str, number: int, name: str) -> Version:
    """Let a tag point to a version; it points to no other from then on.

    Raises:
        ConfigError: there is no such version, or the tag cannot be one.
    """
    _named(name, "tag")
    if name.isdigit():
        raise ConfigError(f"the tag {name!r} looks like a version; give a word, such as production")
    found = {one.number: one for one in versions(model)}
    if number not in found:
        raise ConfigError(
            f"there is no version {number} of {model!r}; there are "
            f"{', '.join(map(str, found)) or 'none'}"
        )
    tags = _tags(model) | {name: number}
    path = home() / model / "tags.json"
    fresh = path.with_name(f".tags.{os.getpid()}.json")
    fresh.write_text(json.dumps(tags, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
    return found[number]


def resolved(name: str) -> Path:
    """The folder of `MODEL@TAG` or `MODEL@NUMBER`.

    Raises:
        ConfigError: there is none, or its folder is gone.
    """
    model, _, which = name.partition("@")
    if model not in models():
        raise ConfigError(
            f"the registry has no model {model!r}; it has {', '.join(models()) or 'none'}"
        )
    tags = _tags(model)
    known = {one.number: one for one in versions(model)}
    number = int(which) if which.isdigit() else tags.get(which, 0)
    if number not in known:
        raise ConfigError(
            f"{model!r} has no version or tag {which!r}; it has the versions "
            f"{', '.join(map(str, known))} and the tags {', '.join(sorted(tags)) or 'none'}"
        )
    path = known[number].path
    if not path.is_dir():
        raise ConfigError(f"{name} was in {path}, which is gone; register it again")
    return path.resolve()


def lineage_of(path: Path) -> dict[str, Any]:
    """Where a run's or a delivered model comes from.

    Raises:
        ConfigError: it is neither, or damaged.
    """
    from umbel.core.files import sha256
    from umbel.deliver.parcel import CLAIMS, is_parcel, read_parcel

    if is_parcel(path):
        delivery = read_parcel(path)
        found: dict[str, Any] = {
            name: delivery.get(name)
            for name in ("name", "run", "app", "app_digest", "form", "metrics", "steps")
        }
        found["sha256"] = sha256(path / delivery["file"])
        certificate = path / CLAIMS / "certificate.json"
    else:
        config = _read(path / "config.json")
        model = path / "model.safetensors"
        if not model.is_file():
            raise ConfigError(f"{path} has no model.safetensors: the run has not ended")
        result = path / "result.json"
        found = {
            "name": config.get("app"),
            "run": path.name,
            "app": config.get("app"),
            "app_digest": config.get("app_hash"),
            "form": "run",
            "metrics": _read(result).get("metrics", {}) if result.is_file() else {},
            "steps": [],
            "sha256": sha256(model),
        }
        certificate = path / "certificate.json"
    signed = _read(certificate) if certificate.is_file() else {}
    found["populations"] = [signed["population"]] if "population" in signed else []
    found["certificate"] = sha256(certificate) if signed else None
    return found


def _tags(model: str) -> dict[str, int]:
    path = home() / model / "tags.json"
    return {name: int(number) for name, number in _read(path).items()} if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return dict(value)
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} is neither a run nor a delivered model ({path.name} is missing)"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _named(name: str, what: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"the {what} is called {name!r}; give letters, digits, dots, dashes and underscores, "
            "80 at most"
        )
