"""Folders of images: the name of a folder is the label of what lies in it.

    ROOT/LABEL/image.png                 ROOT/FOLDER/LABEL/image.png, divided by="folder"

An image is decoded when it is read. All have one size, or are scaled to one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.clients.at_rest.pieces import File, Mask, Piece
from umbel.clients.at_rest.places import EXTRA, WHO, Place, arrow, listed, reading
from umbel.clients.at_rest.tables import short
from umbel.clients.data.examples import Examples
from umbel.clients.frameworks.extras import installed
from umbel.core.errors import ConfigError

LABEL, FOLDER = "label", "folder"
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
PIECE = 128
"""Images of a piece."""


@dataclass(frozen=True)
class ImageFormat:
    """Images in folders.

    Attributes:
        system: Arrow's file system.
        paths: of the images of each folder (or of the whole, under an empty name).
        classes: the labels, in the order of their numbers.
        height: of an image, in pixels.
        width: of an image, in pixels.
        channels: 1 is grey, 3 is colour.
        scale: whether images of another size are scaled.
    """

    system: Any
    paths: Mapping[str, Sequence[str]]
    classes: tuple[str, ...]
    height: int
    width: int
    channels: int
    scale: bool

    @classmethod
    def of(
        cls,
        place: Place,
        *,
        divided: bool,
        classes: Sequence[str],
        size: tuple[int, int] | None,
        channels: int,
    ) -> "ImageFormat":
        """The images of a place.

        Raises:
            ConfigError: there is none, they lie elsewhere, or have labels that nobody named.
        """
        fs = arrow("fs")
        with reading(str(place)):
            system, root = place.opened()
            infos = system.get_file_info(fs.FileSelector(root, recursive=True))
        images = sorted(i.path for i in infos if i.is_file and i.path.lower().endswith(ENDINGS))
        if not images:
            raise ConfigError(f"{place} holds no image; known are {', '.join(ENDINGS)}")
        found: dict[str, list[str]] = {}
        for path in images:
            parts = path.removeprefix(root).strip("/").split("/")
            if len(parts) != 2 + divided:
                shape = "FOLDER/LABEL/image" if divided else "LABEL/image"
                raise ConfigError(f"{short(path)} of {place} does not lie as {shape}; move it")
            found.setdefault(parts[0] if divided else "", []).append(path)
        labels = sorted({path.rsplit("/", 2)[-2] for path in images})
        unknown = [label for label in labels if classes and label not in classes]
        if unknown:
            raise ConfigError(
                f"{place} has the label {unknown[0]!r}, which is none of the classes "
                f"{listed(classes)}; name it among them"
            )
        made = cls(system, found, tuple(classes) or tuple(labels), 0, 0, channels, size is not None)
        height, width = size or made.pixels(images[0]).shape[:2]
        return cls(system, found, made.classes, int(height), int(width), channels, size is not None)

    def kind(self, column: str) -> Any:
        """Of a column: both are texts."""
        del column
        return arrow().string()

    def files(self) -> list[File]:
        return [ImagesOf(self, key, paths) for key, paths in self.paths.items()]

    def pixels(self, path: str) -> np.ndarray[Any, Any]:
        """An image as bytes, (height, width) or (height, width, 3).

        Raises:
            ConfigError: it cannot be read, or has another size.
        """
        image = installed("PIL.Image", EXTRA, WHO)
        with reading(short(path)), self.system.open_input_file(path) as file:
            opened = image.open(file).convert("L" if self.channels == 1 else "RGB")
            if self.scale and self.height:
                opened = opened.resize((self.width, self.height))
            found: np.ndarray[Any, Any] = np.asarray(opened, np.uint8)
        if self.height and found.shape[:2] != (self.height, self.width):
            raise ConfigError(
                f"{short(path)} has {found.shape[0]} x {found.shape[1]} pixels, the first image "
                f"{self.height} x {self.width}; give size=({self.height}, {self.width}) to scale "
                "all to one"
            )
        return found


@dataclass(frozen=True)
class ImagesOf:
    """The images of a folder."""

    of: ImageFormat
    key: str
    paths: Sequence[str]

    @property
    def keys(self) -> Mapping[str, Any]:
        return {FOLDER: self.key} if self.key else {}

    def pieces(self) -> list[Piece]:
        return [
            Images(self.of, self.paths[start : start + PIECE], self.keys)
            for start in range(0, len(self.paths), PIECE)
        ]


@dataclass(frozen=True)
class Images:
    """Some images."""

    of: ImageFormat
    paths: Sequence[str]
    keys: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{short(self.paths[0])} and the {len(self.paths) - 1} images after it"

    @property
    def rows(self) -> int:
        return len(self.paths)

    @property
    def row_bytes(self) -> int:
        return self.of.height * self.of.width * self.of.channels + 8

    def may_hold(self, column: str, wanted: Any) -> bool:
        return column not in self.keys or self.keys[column] in wanted.to_pylist()

    def values(self, column: str) -> Any:
        if column == LABEL:
            return arrow().chunked_array([[path.rsplit("/", 2)[-2] for path in self.paths]])
        return arrow().chunked_array([[self.keys[column]] * self.rows])

    def runs(self, size: int, keep: Mask | None) -> Iterator[Examples]:
        number = {name: place for place, name in enumerate(self.of.classes)}
        for start in range(0, self.rows, size):
            stop = min(start + size, self.rows)
            paths = [p for i, p in enumerate(self.paths[start:stop], start) if _kept(keep, i)]
            shape = (len(paths), self.of.channels, self.of.height, self.of.width)
            x = np.empty(shape, np.uint8)
            for place, path in enumerate(paths):
                pixels = self.of.pixels(path)
                x[place] = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
            y = np.asarray([number[path.rsplit("/", 2)[-2]] for path in paths], np.int64)
            yield Examples(x, y)


def _kept(keep: Mask | None, place: int) -> bool:
    return keep is None or bool(keep[place])
