"""What files are, and whether a folder still has those that it is said to have."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problems(
    said: Mapping[str, str], found: Mapping[str, str], done: str, was: Callable[[str], str]
) -> Iterator[str]:
    """A sentence for each file that is missing, is one too many, or has changed; by name.

    Args:
        said: hashes by name, as they were written down.
        found: as they are now.
        done: what was done with the files when they were written down, such as `delivered`.
        was: from the name of a file that has changed to what it was.
    """
    for name in sorted(said.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in said:
            yield f"{name} is not one of the files that were {done}"
        elif said[name] != found[name]:
            yield f"{name} is not {was(name)}"
