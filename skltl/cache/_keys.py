"""Which image stands where: the content keys of a source's images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import PIL
from PIL import Image, ImageFile
from PIL.features import version

from skltl.cache._store import Shelf
from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images import (
    FILE_STATE_BYTES,
    Crop,
    ImageSource,
    content_key,
    file_state,
    map_ahead,
)
from skltl.inference import FORMAT

KEY_BYTES = 16

# Images in memory are named in groups: a task costs more than a small one's name.
IMAGES_PER_TASK = 32


class ImageKeys:
    """The content keys of images, as far as they are known.

    Files are recognised by path and state; what they hold is remembered on a shelf.

    Parameters
    ----------
    folder : Path
        Of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.shelf_name = _shelf_name()
        self._shelf = Shelf(folder, self.shelf_name, KEY_BYTES + FILE_STATE_BYTES)
        self._keys: dict[int, bytes] = {}
        self._least_side: int | None = None
        self._paths: dict[int, str] = {}
        self._new_files: list[tuple[bytes, bytes]] = []

    def __getitem__(self, position: int) -> bytes:
        return self._keys[position]

    def __contains__(self, position: int) -> bool:
        return position in self._keys

    def find(self, source: ImageSource, n_threads: int) -> None:
        """Find the keys of images in memory, and of files that are known."""
        paths = {position: source.path(position) for position in range(len(source))}
        self._paths = {one: path for one, path in paths.items() if path is not None}
        self._least_side = source.least_side
        self._recognise_files()
        in_memory = [one for one, path in paths.items() if path is None]
        self._name(source, in_memory, n_threads)

    def learn(self, crop: Crop) -> None:
        """Take the key of an image that has been decoded."""
        self._keys[crop.position] = crop.key
        if crop.file is not None:
            name = _name_of(self._paths[crop.position], self._least_side)
            self._new_files.append((name, crop.key + crop.file))

    def stop_storing(self, why: str) -> None:
        """Remember no more files."""
        self._shelf.stop_storing(why)

    def store(self) -> None:
        """Remember the files that have been decoded."""
        self._shelf.write(self._new_files)
        self._new_files.clear()

    def close(self) -> None:
        """Close the shelf."""
        self._shelf.close()

    def _recognise_files(self) -> None:
        names = {
            position: _name_of(path, self._least_side)
            for position, path in self._paths.items()
        }
        known = dict(self._shelf.read(list(set(names.values()))))
        for position, name in names.items():
            if name in known:
                key, state = known[name][:KEY_BYTES], known[name][KEY_BYTES:]
                if state == file_state(self._paths[position]):
                    self._keys[position] = key

    def _name(
        self, source: ImageSource, positions: Sequence[int], n_threads: int
    ) -> None:
        def name(some: Sequence[int]) -> dict[int, bytes]:
            keys = {}
            for position in some:
                try:
                    keys[position] = content_key(source.decode(position))
                except (ImageReadError, ImageTypeError):
                    break  # raised when it is read in the order of the source
            return keys

        tasks = [
            positions[first : first + IMAGES_PER_TASK]
            for first in range(0, len(positions), IMAGES_PER_TASK)
        ]
        for keys in map_ahead(name, tasks, n_threads, 2 * n_threads):
            self._keys |= keys


def _name_of(path: str, least_side: int | None) -> bytes:
    """Name a file, and at which scale it may be decoded: its pixels depend on both."""
    # Not `Path.absolute`, which takes ten times as long, in each fold.
    if not os.path.isabs(path):  # noqa: PTH117
        path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    text = path.encode(errors="surrogatepass")
    if least_side is not None:
        text += f"\0{least_side}".encode()
    return blake2b(text, digest_size=KEY_BYTES).digest()


def _shelf_name() -> str:
    """Name the shelf of files after all that their pixels depend on besides them."""
    facts = (
        FORMAT,
        *_decoders(),
        ImageFile.LOAD_TRUNCATED_IMAGES,
        Image.MAX_IMAGE_PIXELS,
    )
    digest = blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return f"skltl-files-{digest}"


@lru_cache
def _decoders() -> tuple[str | None, ...]:
    names = ("jpg", "libjpeg_turbo", "webp", "libtiff")
    return (PIL.__version__, *map(version, names))
