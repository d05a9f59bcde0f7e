"""Read one item of ``X``: a file, an encoded image in memory, an array or an image.

Whatever holds an encoded image, the same decoder reads it, with the same formats and
limits.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from skltl.exceptions import ImageReadError, ImageTypeError, shorten
from skltl.images._channels import RGB, fault_of_shape
from skltl.images._decode import (
    Decoded,
    Decoding,
    decode_stream,
    is_tensor,
    lock_of,
    read_array,
    read_file,
    read_image,
    reason_of,
    tensor_to_array,
)
from skltl.images._descriptions import is_data_url, is_url

Encoded = (bytes, bytearray, memoryview)

# Characters of a data URL that are shown in messages.
N_SHOWN = 40


def read_item(item: Any, decoding: Decoding, channels_first: bool) -> Decoded:
    """Decode an item; raise ``ValueError`` with the reason if it cannot be read.

    An array of three dimensions is (channels, h, w) if `channels_first`.
    """
    item = without_label(item)
    if isinstance(item, Mapping):
        decoding = replace(decoding, page=_page_of(item) or 0)
        content = item.get("bytes")
        item = item["path"] if content is None else content
    if isinstance(item, (str, os.PathLike)):
        return _read_location(os.fspath(item), decoding)
    if isinstance(item, Image.Image):
        return read_image(item, decoding)
    if isinstance(item, Encoded):
        return decode_stream(io.BytesIO(bytes(item)), decoding)
    if _is_file_object(item):
        return _read_file_object(item, decoding)
    array = tensor_to_array(item) if is_tensor(item) else np.asarray(item)
    if array.ndim == 3 and channels_first:
        array = np.moveaxis(array, 0, 2)
    return read_array(array, decoding)


def check_item(
    index: int, item: Any, labels: Any = None, n_channels: int = RGB
) -> None:
    """Raise an error if an item cannot be an image, whatever its pixels.

    `labels` are the index labels by which the user knows the items, if any.
    """
    item = without_label(item)
    if isinstance(item, (str, Image.Image, *Encoded)):
        return
    if isinstance(item, os.PathLike):
        if isinstance(os.fspath(item), bytes):
            raise ImageTypeError(index, "a path of bytes; expected a path of str")
    elif isinstance(item, np.ma.MaskedArray):
        raise ImageTypeError(index, "a masked array; fill its masked pixels first")
    elif is_array(item):
        if fault := fault_of_shape(tuple(item.shape), n_channels):
            raise ImageReadError(index, None, fault)
    elif is_missing(item):
        raise missing_value(index, labels)
    elif isinstance(item, Mapping) and item.keys() & {"bytes", "path"}:
        _check_mapping(index, item, labels)
    elif _is_file_object(item):
        _check_file_object(index, item)
    else:
        raise ImageTypeError(index, _describe(item))


def file_of(item: Any) -> str | None:
    """Return the path of an item that is a file, all of it; otherwise ``None``."""
    if isinstance(item, Mapping):
        is_path = item.get("bytes") is None and _page_of(item) is None
        item = item.get("path") if is_path else None
    if not isinstance(item, (str, os.PathLike)):
        return None
    path = str(os.fspath(item))  # numpy's strings have another `repr`
    return None if is_data_url(path) or is_url(path) else path


def name_of(item: Any) -> str | None:
    """Return the path, URL or name by which a user knows an item, if it has one."""
    if isinstance(item, Mapping):
        name, page = item.get("path"), _page_of(item)
        item = name if page is None or name is None else f"{name}, page {page}"
    if _is_file_object(item):
        item = getattr(item, "name", None)
    if not isinstance(item, (str, os.PathLike)):
        return None
    name = str(os.fspath(item))
    return shorten(name, N_SHOWN) if is_data_url(name) else name


def is_array(item: Any) -> bool:
    """Return whether an item is a numpy array, a tensor, or can be made an array."""
    if isinstance(item, Encoded):
        return False
    if isinstance(item, np.ndarray) or is_tensor(item):
        return True
    # Not a number of numpy, nor an image of Pillow.
    is_other = isinstance(item, (np.generic, Image.Image)) or not hasattr(item, "shape")
    return hasattr(item, "__array__") and not is_other


def without_label(item: Any) -> Any:
    """Return the image of a tuple (image, label, ...), as items of torch data sets are.

    Labels are no images, and the image is no path: a number beside a path may be that
    of a page or of a frame.
    """
    if not (isinstance(item, tuple) and item):
        return item
    image, *labels = item
    if _holds_pixels(image) and not any(map(_holds_pixels, labels)):
        return image
    return item


def _holds_pixels(item: Any) -> bool:
    """Return whether an item is an image in memory: of two dimensions, or encoded."""
    if is_array(item):
        return len(item.shape) > 1
    is_encoded = isinstance(item, (Image.Image, Mapping, *Encoded))
    return is_encoded or _is_file_object(item)


def is_missing(item: object) -> bool:
    """Return whether an item is a missing value: None, NaN, NaT or NA."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return isinstance(item, (float, np.floating)) and bool(item != item)


def missing_value(index: int, labels: Any) -> ImageTypeError:
    """Return the error for a missing value, with its index label if there is one."""
    label = label_name(index, labels)
    name = "" if label is None else f" ({label})"
    return ImageTypeError(index, f"a missing value{name}; drop its row")


def label_name(index: int, labels: Any) -> str | None:
    """Return the name of an item by its index label, if there are labels."""
    if labels is None:
        return None
    label = labels[index]
    label = label.item() if isinstance(label, np.generic) else label
    return f"index label {shorten(repr(label))}"


def type_name(item: object) -> str:
    """Return the name of an item's class, shortened."""
    return shorten(type(item).__name__, 60)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Raise ``ValueError`` in place of any error of code that is not skltl's.

    Readers, containers, file objects and file systems of users raise errors that have
    no common base class.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(reason_of(error)) from error
    except Exception as error:
        message = shorten(str(error), 300)
        kind = type(error).__name__
        raise ValueError(f"{kind}: {message}" if message else kind) from error


def _read_location(location: str, decoding: Decoding) -> Decoded:
    """Decode a file, a data URL, or a file of a URL."""
    if is_data_url(location):
        return decode_stream(io.BytesIO(_content_of(location)), decoding)
    if not is_url(location):
        return read_file(location, decoding)
    import fsspec

    with foreign_errors(), fsspec.open(location, "rb") as stream:
        return decode_stream(stream, decoding)


def _page_of(item: Mapping[str, Any]) -> int | None:
    """Return the page of a dictionary, if it has one; pandas stores it as a float."""
    page: Any = item.get("page")
    if is_missing(page):
        return None
    is_whole = isinstance(page, (float, np.floating)) and float(page).is_integer()
    return int(page) if is_whole else page


def _content_of(url: str) -> bytes:
    """Return the content of a data URL (RFC 2397)."""
    header, comma, data = url.partition(",")
    if not comma:
        raise ValueError("it is a data URL without a comma, and has no content")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        text = unquote_to_bytes("".join(data.split()))
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise ValueError(f"its base64 data is damaged: {error}") from error


def _is_file_object(item: Any) -> bool:
    return callable(getattr(item, "read", None)) and not isinstance(
        item, (os.PathLike, Image.Image)
    )


def _check_file_object(index: int, item: Any) -> None:
    """Refuse a file object that cannot be read from its beginning, again and again."""
    kind = f"a file object ({type_name(item)})"
    if isinstance(item, io.TextIOBase):
        raise ImageTypeError(index, f"{kind} in text mode; open it in binary mode")
    if inspect.iscoroutinefunction(item.read):
        raise ImageTypeError(index, f"{kind} that is read with await; pass its content")
    if not callable(getattr(item, "seek", None)):
        raise ImageTypeError(index, f"{kind} without seek(); pass its content, read()")


def _read_file_object(stream: IO[bytes], decoding: Decoding) -> Decoded:
    """Decode a file object from its beginning; its position does not change."""
    with lock_of(stream), foreign_errors():
        position = stream.tell()
        try:
            return decode_stream(stream, decoding)
        finally:
            stream.seek(position)


def _check_mapping(index: int, item: Mapping[str, Any], labels: Any) -> None:
    """Refuse a dictionary whose content and path are missing or of other types."""
    content, path = item.get("bytes"), item.get("path")
    if is_missing(content) and is_missing(path):
        raise missing_value(index, labels)
    key, value = ("path", path) if content is None else ("bytes", content)
    expected: Any = (str, os.PathLike) if content is None else Encoded
    if not isinstance(value, expected):
        raise ImageTypeError(index, f"a dictionary whose {key!r} is {_kind(value)}")
    page = _page_of(item)
    is_number = isinstance(page, (int, np.integer)) and not isinstance(page, bool)
    if page is not None and not (is_number and page >= 0):
        raise ImageTypeError(
            index,
            f"a dictionary whose 'page' is {shorten(repr(page), 40)}, not 0 or "
            "a larger number",
        )


def _describe(item: object) -> str:
    """Describe an item that is no image, as the end of "Image 3 is ..."."""
    if isinstance(item, (int, float, np.number)):
        return f"a number ({shorten(repr(item), 40)}), not a path or an image"
    if isinstance(item, Mapping):
        keys = shorten(", ".join(repr(key) for key in item), 120)
        return f"a dictionary without 'bytes' and 'path'; its keys are {keys or 'none'}"
    if isinstance(item, (list, tuple)):
        return (
            f"a {type_name(item)} of {len(item)} objects, not a path, an image or an "
            "array; of pairs (image, label), pass the images alone"
        )
    return f"{_kind(item)}, not a path, an image or an array"


def _kind(item: object) -> str:
    return f"of type {type_name(item)}"
