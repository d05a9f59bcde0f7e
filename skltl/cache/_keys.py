"""Keys of images, and the database of files whose images are known.

The keys of pixels and file states are in `skltl.images`, which computes them while an
image is decoded; those of networks and settings in `skltl.inference.fingerprints`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from importlib import metadata
from importlib.util import find_spec

import PIL
from PIL import Image, ImageFile
from PIL.features import version

from skltl.cache._store import Entry, Store, chunks
from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images import (
    FILE_STATE_BYTES,
    Crop,
    ImageSource,
    content_key,
    file_state,
    prefetch,
)
from skltl.inference import FORMAT

KEY_BYTES = 16

# Length of what is stored about a file: the key of its image, and its state.
FILE_ENTRY_BYTES = KEY_BYTES + FILE_STATE_BYTES

# Images in memory are hashed in groups: a task costs more than hashing a small image.
IMAGES_PER_TASK = 32


def files_database() -> str:
    """Return the name of the database of known files.

    It depends on everything besides the file that determines its pixels.
    """
    facts = (
        FORMAT,
        *_decoder_versions(),
        ImageFile.LOAD_TRUNCATED_IMAGES,
        Image.MAX_IMAGE_PIXELS,
    )
    digest = blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return f"skltl-files-{digest}"


def find_keys(
    source: ImageSource, known_files: Store, n_threads: int
) -> dict[int, bytes]:
    """Return the keys, by position, of arrays and of known files."""
    paths = {position: source.path(position) for position in range(len(source))}
    files = {position: path for position, path in paths.items() if path is not None}
    arrays = [position for position in range(len(source)) if source.is_array(position)]
    return _keys_of_files(files, source.variant(), known_files) | _keys_of_arrays(
        source, arrays, n_threads
    )


def file_entry(source: ImageSource, crop: Crop) -> list[Entry]:
    """Return the entry for the file of an image, if it can be recognized next time."""
    path = source.path(crop.position)
    if path is None or crop.file is None:
        return []
    return [(_path_digest(path, source.variant()), crop.key + crop.file)]


def _keys_of_files(
    files: dict[int, str], variant: bytes, known_files: Store
) -> dict[int, bytes]:
    digests = {
        position: _path_digest(path, variant) for position, path in files.items()
    }
    entries = dict(known_files.read(list(set(digests.values()))))
    keys = {}
    for position, digest in digests.items():
        entry = entries.get(digest)
        # An entry of another state is of an earlier content.
        if entry and entry[KEY_BYTES:] == file_state(files[position]):
            keys[position] = entry[:KEY_BYTES]
    return keys


def _keys_of_arrays(
    source: ImageSource, positions: Sequence[int], n_threads: int
) -> dict[int, bytes]:
    def hash_images(group: Iterable[int]) -> dict[int, bytes]:
        keys = {}
        for position in group:
            # Errors are raised when images are decoded, in the order of the source.
            with suppress(ImageReadError, ImageTypeError):
                keys[position] = content_key(source.decode(position))
        return keys

    groups = chunks(positions, IMAGES_PER_TASK)
    keys: dict[int, bytes] = {}
    for keys_of_group in prefetch(hash_images, groups, n_threads, 2 * n_threads):
        keys |= keys_of_group
    return keys


def _path_digest(path: str, variant: bytes) -> bytes:
    """Hash a path, and how the file is read."""
    # Not `Path.absolute`, which takes ten times as long, in each fold.
    if not os.path.isabs(path):  # noqa: PTH117
        path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    text = path.encode(errors="surrogatepass") + b"\0" + variant
    return blake2b(text, digest_size=KEY_BYTES).digest()


@cache
def _decoder_versions() -> tuple[str | None, ...]:
    """Return the versions of Pillow and of the libraries that it decodes files with."""
    libraries = ("jpg", "libjpeg_turbo", "webp", "libtiff", "avif")
    heif = metadata.version("pillow-heif") if find_spec("pillow_heif") else None
    return PIL.__version__, *map(version, libraries), heif
