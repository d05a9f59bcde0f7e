"""Recognize what ``X`` is, and provide it as a lazy sequence of images.

The rules are about ``X`` as a whole, never about one item, so that the meaning of an
image does not depend on its neighbors:

- strings and path-like objects are files, or URLs;
- an array (n, h, w) holds gray images; in an array of four dimensions, and in a list
  of three-dimensional arrays, the channels are the last axis if it has 1, 3 or 4
  entries, else the one before height. For torch tensors it is the other way round. Of a
  lazy sequence, the first item decides. For a network that takes neither gray nor RGB
  images, the channels are the axis with as many entries as it takes;
- an array (n, d) holds rows of pixels, which are images only with an `image_shape`.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import PurePath
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl._code import description, why_not_picklable
from skltl.exceptions import ImageError, ImageReadError, ImageTypeError, shorten
from skltl.images._channels import (
    RGB,
    channel_counts,
    has_channels_first,
    may_have_channels,
)
from skltl.images._containers import (
    EXPECTED,
    Items,
    LazyItems,
    check_not_masked,
    index_labels,
    unwrap,
)
from skltl.images._decode import (
    EXACT,
    Decoded,
    Decoding,
    Pixels,
    is_tensor,
    to_pixels,
)
from skltl.images._items import (
    Encoded,
    check_item,
    file_of,
    foreign_errors,
    is_array,
    is_missing,
    label_name,
    missing_value,
    name_of,
    read_item,
    without_label,
)
from skltl.images._memory import one_image
from skltl.images._ranges import PixelRanges, range_of

# From an item of ``X`` to an image.
Reader = Callable[[Any], Any]


class ImageSource:
    """Images that are decoded on access: paths, PIL images, arrays or tensors.

    Items of three dimensions are (channels, h, w) if `channels_first`. `labels` are the
    index labels by which the user knows the items, if any. With a `reader`, its results
    are decoded instead of the items.
    """

    def __init__(
        self,
        items: Items,
        channels_first: bool = False,
        labels: Any = None,
        decoding: Decoding = EXACT,
        reader: Reader | None = None,
    ) -> None:
        self._items = items
        self._channels_first = channels_first
        self._labels = labels
        self._reader = reader
        self._reads_other_files = Event()
        self.decoding = decoding
        self.ranges = PixelRanges()

    def reduced_to(self, least_side: int) -> ImageSource:
        """Return the same images, decoded at a smaller scale where possible.

        Both sides of each image keep at least `least_side` pixels.
        """
        reduced = copy.copy(self)
        reduced.decoding = replace(self.decoding, least_side=least_side)
        return reduced

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Pixels]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Decode image ``index``: an array (h, w, channels), uint8 or float32."""
        return to_pixels(self.decode(index))

    def decode(self, index: int) -> Decoded:
        """Decode image ``index`` to an array or a PIL image; see `Decoded`."""
        return self.decode_item(index, self.fetch(index))

    def fetch(self, index: int) -> Any:
        """Return item ``index`` of ``X``; a lazy sequence may decode it."""
        if not isinstance(self._items, LazyItems):
            return self._items[index]
        try:
            with foreign_errors():
                return self._items[int(index)]
        except ValueError as error:
            raise ImageReadError(int(index), None, str(error)) from error.__cause__

    def decode_item(self, index: int, item: Any) -> Decoded:
        """Decode the item that was fetched as ``index``.

        With `fetch`, all access to the images; subclasses may override both.
        """
        if self._reader is None:
            check_item(int(index), item, self._labels, self.decoding.n_channels)
        try:
            if isinstance(item, np.ndarray) and self._reader is None:  # in memory
                return self._read(index, item)
            with one_image():
                return self._read(index, item)
        except ImageReadError:  # of what the reader returned
            raise
        except ValueError as error:
            cause = error.__cause__ or error
            name = name_of(item) or label_name(int(index), self._labels)
            raise ImageReadError(int(index), name, str(error)) from cause

    @property
    def is_lazy(self) -> bool:
        """Whether fetching an item may take as long as decoding it."""
        return isinstance(self._items, LazyItems)

    def file_of(self, item: Any) -> str | None:
        """Return the path of an item that is a file, or ``None``.

        With a reader, only a plain path says all of an item; and once the reader has
        returned the path of another file, the images are not those of the items' files.
        """
        if self._reader is not None:
            is_plain = isinstance(item, PurePath) or type(item) in (str, np.str_)
            if not is_plain or self._reads_other_files.is_set():
                return None
        return file_of(item)

    def path(self, index: int) -> str | None:
        """Return the path of image ``index``, or ``None`` if it is not a file.

        It is ``None`` in a lazy sequence, too, of which nothing is fetched.
        """
        return None if self.is_lazy else self.file_of(self._items[index])

    def name(self, index: int) -> str | None:
        """Return the path, URL or name of image ``index``, if it has one."""
        return name_of(self.fetch(index))

    def is_array(self, index: int) -> bool:
        """Return whether image ``index`` is an array or tensor, which is not decoded.

        The content of such an image is known sooner than its crop.
        """
        return not (self.is_lazy or self._reader) and is_array(self._items[index])

    def variant(self) -> bytes:
        """Return what determines the image of a file besides its content."""
        if self._reader is None:
            return repr(self.decoding).encode()
        return repr(self.decoding).encode() + self._reader_identity

    @cached_property
    def _reader_identity(self) -> bytes:
        """Code of the reader, its `version`, and that of its package."""
        module = getattr(self._reader, "__module__", None) or ""
        package = sys.modules.get(module.partition(".")[0])
        versions = getattr(self._reader, "version", None), _version_of(package)
        return description((self._reader, repr(versions)), "reader")

    def check_items(self) -> None:
        """Raise an error for the first item that cannot be an image by its type."""
        for index in range(len(self)):
            check_item(
                index, self._items[index], self._labels, self.decoding.n_channels
            )

    def warn_of_odd_range(self) -> None:
        """Warn once if the values read so far are unusual for pixels."""
        self.ranges.warn_if_odd()

    def _read(self, index: int, item: Any) -> Decoded:
        """Decode an item and add its range to those of the source."""
        channels_first = self._channels_first
        if self._reader is not None:
            item = self._read_by_user(index, item)
            channels_first = self._has_channels_first(item)
        item = without_label(item)
        decoded = read_item(item, self.decoding, channels_first)
        found = range_of(decoded)
        if found is not None and self.decoding.value_range is None:
            is_float = is_array(item) and _is_floating(item)
            self.ranges.add("floats" if is_float else "16-bit", *found)
        return decoded

    def _has_channels_first(self, image: Any) -> bool:
        """Decide for the result of a reader alone: others may have another format."""
        n_channels = self.decoding.n_channels
        if not (is_array(image) and may_have_channels(image.shape, n_channels)):
            return False
        return has_channels_first({0: image.shape}, is_tensor(image), n_channels)

    def _read_by_user(self, index: int, item: Any) -> Any:
        """Return the result of the user's reader for an item."""
        assert self._reader is not None
        name = getattr(self._reader, "__qualname__", type(self._reader).__name__)
        with foreign_errors():
            image = self._reader(item)
        if file_of(image) not in (None, file_of(item)):
            self._reads_other_files.set()
        try:
            check_item(index, image, n_channels=self.decoding.n_channels)
        except ImageReadError as error:
            raise ValueError(f"{name} returned an array: {error.reason}") from error
        except ImageTypeError as error:
            raise ValueError(f"{name} returned {error.reason}") from error
        return image


class JoinedSource(ImageSource):
    """The images of two sources that are read alike, one after the other."""

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        super().__init__((), decoding=first.decoding, reader=first._reader)
        self._parts = first, second
        # An unusual range, and a reader of other files, concern both.
        self.ranges = second.ranges = first.ranges
        second._reads_other_files = first._reads_other_files

    def reduced_to(self, least_side: int) -> ImageSource:
        """Return the same images, decoded at a smaller scale where possible."""
        return JoinedSource(*(part.reduced_to(least_side) for part in self._parts))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def is_lazy(self) -> bool:
        """Whether fetching an item may take as long as decoding it."""
        return any(part.is_lazy for part in self._parts)

    def fetch(self, index: int) -> Any:
        """Return an item of one of the sources."""
        return self._of_part("fetch", index)

    def decode_item(self, index: int, item: Any) -> Decoded:
        """Decode an item of one of the sources."""
        decoded: Decoded = self._of_part("decode_item", index, item)
        return decoded

    def file_of(self, item: Any) -> str | None:
        """Return the path of an item that is a file, or ``None``."""
        return self._parts[0].file_of(item)

    def path(self, index: int) -> str | None:
        """Return the path of an image, or ``None`` if it is not a file."""
        path: str | None = self._of_part("path", index)
        return path

    def is_array(self, index: int) -> bool:
        """Return whether an image is an array or tensor, which is not decoded."""
        return bool(self._of_part("is_array", index))

    def _of_part(self, method: str, index: int, *args: Any) -> Any:
        """Call a method of the source of an image; errors have the joint index."""
        n_first = len(self._parts[0])
        part, start = (
            (self._parts[0], 0) if index < n_first else (self._parts[1], n_first)
        )
        try:
            return getattr(part, method)(int(index) - start, *args)
        except ImageError as error:
            raise error.moved_to(int(index)) from error.__cause__


class PartOfSource(ImageSource):
    """Consecutive images of a source; errors have the index in the whole."""

    def __init__(self, whole: ImageSource, rows: slice) -> None:
        super().__init__((), decoding=whole.decoding, reader=whole._reader)
        self._whole = whole
        self._rows = rows
        self.ranges = whole.ranges
        self._reads_other_files = whole._reads_other_files

    def reduced_to(self, least_side: int) -> ImageSource:
        """Return the same images, decoded at a smaller scale where possible."""
        return PartOfSource(self._whole.reduced_to(least_side), self._rows)

    def __len__(self) -> int:
        return int(self._rows.stop - self._rows.start)

    def fetch(self, index: int) -> Any:
        """Return an item of the whole."""
        return self._whole.fetch(self._rows.start + index)

    def decode_item(self, index: int, item: Any) -> Decoded:
        """Decode an item of the whole."""
        return self._whole.decode_item(self._rows.start + index, item)

    @property
    def is_lazy(self) -> bool:
        """Whether fetching an item may take as long as decoding it."""
        return self._whole.is_lazy

    def file_of(self, item: Any) -> str | None:
        """Return the path of an item that is a file, or ``None``."""
        return self._whole.file_of(item)

    def path(self, index: int) -> str | None:
        """Return the path of an image, or ``None`` if it is not a file."""
        return self._whole.path(self._rows.start + index)

    def is_array(self, index: int) -> bool:
        """Return whether an image is an array or tensor, which is not decoded."""
        return self._whole.is_array(self._rows.start + index)


def read_images(
    X: Any,
    image_shape: tuple[int, ...] | None = None,
    check_items: bool = True,
    value_range: tuple[float, float] | None = None,
    reader: Reader | None = None,
    n_channels: int = RGB,
) -> ImageSource:
    """Recognize what ``X`` is; nothing is decoded yet.

    With `image_shape`, ``X`` is an array (n, d), and each row an image of this shape.
    Without `check_items`, an item of a wrong type is an error only when it is read.
    With a `reader`, items may be of any type. Images are decoded to `n_channels`. An
    ``X`` that is no sequence of images raises ``TypeError`` (`ImageTypeError` for one
    of its items); if it is empty, a single image or of a wrong shape, ``ValueError``.
    """
    decoding = Decoding(value_range=value_range, n_channels=n_channels)
    if image_shape is not None:
        check_not_masked(X)
        images = _rows_as_images(X, image_shape)
        if images.ndim == 3 and 1 not in channel_counts(n_channels):
            raise ValueError(
                f"image_shape={image_shape} has no channels, and the network takes "
                f"{n_channels} of them."
            )
        channels_first = has_channels_first({0: images.shape[1:]}, False, n_channels)
        return ImageSource(images, channels_first, decoding=decoding)
    labels = index_labels(X)
    X = unwrap(X)
    if reader is not None:
        _check_not_empty((len(X),))
        return ImageSource(X, labels=labels, decoding=decoding, reader=reader)
    if isinstance(X, LazyItems):
        return _source_of_lazy(X, decoding)
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUT":
        # A column without any value, which pandas stores as floats or dates.
        if X.ndim == 1 and len(X) and is_missing(X[0]):
            raise missing_value(0, labels)
        return _source_of_array(X, decoding)
    if is_tensor(X):
        return _source_of_array(X, decoding)
    return _source_of_items(X, labels, check_items, decoding)


def _source_of_lazy(X: LazyItems, decoding: Decoding) -> ImageSource:
    """Return the source of a lazy sequence, of which one item is fetched at most."""
    if X.shape is not None:
        return _source_of_array(X, decoding)
    _check_not_empty((len(X),))
    first = without_label(X.first())
    channels_first = _channels_first([first], decoding.n_channels, is_strict=False)
    return ImageSource(X, channels_first, decoding=decoding)


def _source_of_items(
    X: Any, labels: Any, check_items: bool, decoding: Decoding
) -> ImageSource:
    """Return the source of a list of paths, images or arrays."""
    if isinstance(X, np.ndarray) and X.ndim != 1:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of {shorten(str(X.dtype), 60)} of "
            f"shape {shorten(str(X.shape))}."
        )
    _check_not_empty((len(X),))
    if all(map(_is_row, X)):
        return _source_of_array(_stack(X), decoding)
    if check_items:  # an error about one item comes before one about all of them
        ImageSource(X, labels=labels, decoding=decoding).check_items()
    items = map(without_label, X)
    channels_first = _channels_first(items, decoding.n_channels, check_items)
    return ImageSource(X, channels_first, labels, decoding)


def _channels_first(items: Iterable[Any], n_channels: int, is_strict: bool) -> bool:
    """Decide which axis holds the channels, by the arrays that may have any."""
    arrays = {index: item for index, item in enumerate(items) if is_array(item)}
    prefers_first = bool(arrays) and all(map(is_tensor, arrays.values()))
    shapes = {
        index: tuple(array.shape)
        for index, array in arrays.items()
        if may_have_channels(tuple(array.shape), n_channels)
    }
    return has_channels_first(shapes, prefers_first, n_channels, is_strict)


def _is_row(item: Any) -> bool:
    """Return whether an item is a row of pixels, or nested rows."""
    if isinstance(item, Encoded):
        return False
    if isinstance(item, (list, tuple)):
        return not any(
            isinstance(part, (str, os.PathLike, Image.Image))
            or getattr(part, "ndim", 0) > 1
            for part in item
        )
    return getattr(item, "ndim", 0) == 1


def _stack(X: Any) -> NDArray[Any]:
    """Convert nested lists to one array."""
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise ValueError(
            "X is a list of lists of different lengths. Pass each image as an array."
        ) from error
    if array.dtype.kind not in "buifc":
        raise ValueError(f"Expected {EXPECTED}, got nested lists of {array.dtype}.")
    return array


def _source_of_array(X: Any, decoding: Decoding) -> ImageSource:
    """Return the source of one numeric array or tensor."""
    shape, prefers_first = tuple(X.shape), is_tensor(X)
    n_channels = decoding.n_channels
    if isinstance(X, np.ndarray) and X.dtype.kind == "S":
        raise ValueError(
            f"Expected {EXPECTED}, got an array of bytes; convert file names to str: "
            "X.astype(str)."
        )
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of shape {shorten(str(shape))}. "
            "Reshape your data."
        )
    if len(shape) == 2:
        raise ValueError(
            f"X has shape {shape}: rows are images only if their shape is known. Pass "
            f"for instance {_suggest_image_shape(shape[1], n_channels)}, as in "
            "numpy.reshape. "
            "Reshape your data to (n, h, w) if it is a single image."
        )
    _check_not_empty(shape)
    if len(shape) == 4:
        channels_first = has_channels_first({0: shape[1:]}, prefers_first, n_channels)
        return ImageSource(X, channels_first, decoding=decoding)
    if 1 not in channel_counts(n_channels):
        is_single = n_channels in (shape[0], shape[2])
        raise ValueError(
            f"X has shape {shape}, and the network takes images of {n_channels} "
            f"channels: pass an array of shape (n, h, w, {n_channels})"
            + (", X[None] if it is a single image." if is_single else ".")
        )
    if shape[0 if prefers_first else 2] in (3, 4):
        raise ValueError(
            f"X has shape {shape}, which looks like a single color image. Reshape "
            "your data: X[None] if it is one, or add an axis of one channel if X is a "
            "stack of gray images."
        )
    return ImageSource(X, decoding=decoding)


def check_reader(reader: Any) -> None:
    """Raise an error if this is no function that can be sent to another process."""
    if reader is None:
        return
    name = getattr(reader, "__qualname__", type(reader).__name__)
    if not callable(reader):
        raise ValueError(f"reader={shorten(repr(reader))} is not callable.")
    reason = why_not_picklable(reader)
    if reason:
        raise ValueError(
            f"reader={name} cannot be pickled. Define a function with a name at the "
            f"top of a module. ({reason})"
        )


def check_value_range(value_range: Any) -> None:
    """Raise an error if these are not the values of black and white."""
    if value_range is None:
        return
    is_list = isinstance(value_range, (tuple, list))
    is_pair = (
        is_list
        and len(value_range) == 2
        and all(
            isinstance(value, Real) and math.isfinite(value) for value in value_range
        )
    )
    if not is_pair or value_range[0] == value_range[1]:
        raise ValueError(
            f"value_range={shorten(repr(value_range))}: expected two different finite "
            "numbers, the values of black and white."
        )


def _check_not_empty(shape: tuple[int, ...]) -> None:
    """Raise an error if there are no images, or no pixels in them."""
    if shape[0] == 0:
        # The words of scikit-learn's own check.
        raise ValueError(
            f"Found array with 0 sample(s) (shape={shape}) while a minimum of 1 is "
            "required."
        )
    if 0 in shape:
        raise ValueError(f"The images are empty: X has shape {shape}.")


def _rows_as_images(rows: NDArray[Any], image_shape: tuple[Any, ...]) -> NDArray[Any]:
    """Reshape rows (n, d) to (n, *image_shape), as ``numpy.reshape`` would.

    uint8, uint16 and bool define white and are kept; other dtypes become float32.
    """
    is_shape = len(image_shape) in (2, 3) and all(
        not isinstance(size, bool)
        and isinstance(size, Integral)
        and (int(size) > 0 or int(size) == -1)
        for size in image_shape
    )
    if not is_shape or image_shape.count(-1) > 1:
        raise ValueError(
            f"image_shape={shorten(str(image_shape))} is not the shape of an image: "
            "expected (h, w) or (h, w, channels), in pixels; one of them may be -1."
        )
    n_columns = rows.shape[1]
    known = math.prod(size for size in image_shape if size != -1)
    fits = n_columns % known == 0 if -1 in image_shape else n_columns == known
    if not fits:
        raise ValueError(
            f"image_shape={shorten(str(image_shape))} does not fit rows of {n_columns} "
            "values."
        )
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    if rows.dtype not in (np.uint8, np.uint16, np.bool_):
        rows = rows.astype(np.float32, copy=False)
    return rows.reshape(len(rows), *image_shape)


def _suggest_image_shape(n_columns: int, n_channels: int) -> str:
    """Return, as code, a possible ``image_shape`` for rows of this length."""
    counts = channel_counts(n_channels)
    for count in counts:
        side = math.isqrt(n_columns // count)
        if count * side**2 == n_columns:
            shape = (side, side) if count == 1 else (side, side, count)
            return f"image_shape={shape}"
    return f"image_shape=(height, width{'' if 1 in counts else f', {n_channels}'})"


def _version_of(package: object) -> str:
    return str(getattr(package, "__version__", ""))


def _is_floating(array: Any) -> bool:
    """Return whether the values of an array or tensor are floats."""
    if is_tensor(array):
        return bool(array.is_floating_point())
    return bool(np.dtype(array.dtype).kind == "f")
