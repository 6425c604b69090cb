"""A node's policy file is read, and the files that it names.

A file is read when it has changed; one that cannot be used refuses everything (`clients/gate.py`).
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from umbel.core.errors import ConfigError
from umbel.strategies.policy.keys import KEYS, UNLIMITED
from umbel.strategies.policy.node_policy import NodePolicy
from umbel.strategies.secure.policy import Policy

POLICY = "policy"
"""Key of a node's configuration that names its policy file."""
FORMER = "secure-policy"
"""Its former name, which is read too."""


def load_policy(path: Path) -> NodePolicy:
    """Read a policy file.

    Raises:
        ConfigError: it cannot be read, has an unknown key or a value of the wrong kind.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the policy file {path} cannot be read: {error}") from error
    known = {key.name: key for key in KEYS}
    for name, value in found.items():
        if name not in known or not known[name].fits(value):
            raise ConfigError(
                f"{path} says {name} = {value!r}, which is no such setting; known are "
                f"{', '.join(sorted(known))}; umbel client policy explains them"
            )
    for name in ("epsilon", "record-epsilon"):
        if found.get(name) == UNLIMITED:
            found[name] = math.inf
    protecting = [
        key.name for key in KEYS if key.protects and found.get(key.name) not in (None, math.inf)
    ]
    if protecting and found.get("unprotected") is True:
        raise ConfigError(
            f"{path} says unprotected = true and {protecting[0]}, which asks for protection; "
            "leave out one of them"
        )
    sums = [key.name for key in KEYS if key.sums and key.name in found]
    plain = {name.replace("-", "_"): found[name] for name in found if name not in sums}
    for name in ("answer", "apps"):
        if name in plain:
            plain[name] = frozenset(each.lower() for each in plain[name])
    return NodePolicy(
        **{"unprotected": not protecting, **plain},
        sums=_sums(path, {name: found[name] for name in sums}),
        only_sums=sums[0] if sums else "",
        given=tuple(found),
    )


def policy_path(config: Mapping[str, Any]) -> str:
    """The policy file that a node's configuration names; empty where it names none.

    Raises:
        ConfigError: it names two.
    """
    named = {str(config[key]) for key in (POLICY, FORMER) if config.get(key)}
    if len(named) > 1:
        raise ConfigError(
            f"this node's policy is {' and '.join(sorted(named))}; name one file, by --policy"
        )
    return next(iter(named), "")


def policy_of(config: Mapping[str, Any]) -> NodePolicy:
    """The policy of a node with this configuration; a changed file is read anew.

    Raises:
        ConfigError: its file cannot be used.
    """
    path = policy_path(config)
    if not path:
        return _NONE
    try:
        stamp = os.stat(path).st_mtime_ns  # noqa: PTH116 - half the time of pathlib's, a message
    except OSError as error:
        raise ConfigError(f"the policy file {path} cannot be read: {error}") from error
    return _read(path, stamp)


_NONE = NodePolicy()


@lru_cache(maxsize=64)
def _read(path: str, stamp: int) -> NodePolicy:  # noqa: ARG001
    return load_policy(Path(path))


def _sums(path: Path, found: Mapping[str, Any]) -> Policy:
    """The limits on secure sums."""
    sums = Policy()
    for name, value in found.items():
        if name == "roster":
            value = _read_roster(path.parent / value)
        elif name == "authority":
            value = _read_authority(path.parent / value)
        elif name == "bits":
            value = tuple(value)
        sums = replace(sums, **{name.replace("-", "_"): value})
    return sums


def _read_roster(path: Path) -> frozenset[str]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"the roster file {path} cannot be read: {error}") from error
    lines = [line for line in lines if not line[0].startswith("#")]
    for line in lines:
        if len(line) != 2 or len(line[1]) != 64:
            raise ConfigError(f"{path} has the line {' '.join(line)!r}; write NAME and a SHA-256")
    return frozenset(line[1].lower() for line in lines)


def _read_authority(path: Path) -> bytes:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the authority's certificate {path} cannot be read: {error}") from error
    return certificate.public_bytes(serialization.Encoding.DER)
