"""Recognise what ``X`` is, and serve it as a lazy sequence of RGB pictures.

The rules are about ``X`` as a whole, never about one item, so that a picture does not
change its meaning with its neighbours:

- strings and path-like objects are files;
- an array (n, h, w) holds grey pictures; in an array of four dimensions, and in a list
  of three-dimensional arrays, the channels are the last axis if it has 1, 3 or 4
  entries, else the one before height. For torch tensors it is the other way round;
- an array (n, d) holds rows of numbers, which are pictures only with an `image_shape`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl.exceptions import ImageReadError, ImageTypeError, shorten
from skltl.images._containers import (
    EXPECTED,
    check_not_masked,
    label_of,
    labels_of,
    stacked,
    unwrap,
)
from skltl.images._decode import (
    Decoded,
    Pixels,
    is_tensor,
    read_array,
    read_file,
    read_image,
    tensor_to_array,
    to_pixels,
)
from skltl.images._ranges import PixelRanges
from skltl.images._refusals import is_missing, refuse_item
from skltl.images._rows import (
    CHANNEL_COUNTS,
    as_pixels,
    rows_as_images,
    suggest_image_shape,
)
from skltl.images._sharing import one_image

# Arrays are no `Sequence` to Python, but serve as one here.
Items: TypeAlias = Sequence[Any] | NDArray[Any]


class ImageSource:
    """Pictures that are decoded when they are asked for.

    Parameters
    ----------
    items : sequence
        Paths, PIL pictures, arrays or tensors, one for each picture.
    channels_first : bool, default=False
        Whether three-dimensional items are (channels, h, w).
    labels : sequence or None, default=None
        By which labels the user knows the items, if they have any.
    """

    def __init__(
        self, items: Items, channels_first: bool = False, labels: Any = None
    ) -> None:
        self._items = items
        self._channels_first = channels_first
        self._labels = labels
        self._ranges = PixelRanges()
        self.least_side: int | None = None

    def reduced_to(self, least_side: int) -> ImageSource:
        """Return the same pictures, decoded at a smaller scale where that is possible.

        Parameters
        ----------
        least_side : int
            No side of a picture gets shorter than so many pixels.

        Returns
        -------
        ImageSource
            Of the same items.
        """
        reduced = copy.copy(self)
        reduced.least_side = least_side
        return reduced

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Pixels]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Decode picture ``index``: an array (h, w, 3), uint8 or float32."""
        return to_pixels(self.decode(index))

    def decode(self, index: int) -> Decoded:
        """Decode picture ``index``: such an array, or a PIL image; see `Decoded`.

        All ways to a picture lead through here, which subclasses may exchange.
        """
        item = self._items[index]
        self._check(int(index), item)
        try:
            if isinstance(item, np.ndarray):  # it is in memory already
                return self._read(item)
            with one_image():
                return self._read(item)
        except ValueError as error:
            cause = error.__cause__ or error
            raise ImageReadError(int(index), self.path(index), str(error)) from cause

    def path(self, index: int) -> str | None:
        """Return the path of picture ``index``, or ``None`` if it is not a file."""
        item = self._items[index]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else None

    def _read(self, item: Any) -> Decoded:
        is_float = False
        if isinstance(item, (str, os.PathLike)):
            decoded = read_file(item, self.least_side)
        elif isinstance(item, Image.Image):
            decoded = read_image(item, self.least_side)
        else:
            array = tensor_to_array(item) if is_tensor(item) else np.asarray(item)
            if array.ndim == 3 and self._channels_first:
                array = np.moveaxis(array, 0, 2)
            is_float = array.dtype.kind == "f"
            decoded = read_array(array)
        self._ranges.see(decoded, is_float)
        return decoded

    def check_items(self) -> None:
        """Refuse items that cannot be images, whatever their pixels."""
        for index, item in enumerate(self._items):
            self._check(index, item)

    def _check(self, index: int, item: Any) -> None:
        if isinstance(item, (str, Image.Image)):
            return
        if not isinstance(item, np.ndarray) and is_missing(item):
            raise _missing(index, self._labels)
        check_item(index, item)

    def _widen_seen_range(self, low: float, high: float) -> None:
        self._ranges.see_floats(low, high)

    def warn_of_odd_range(self) -> None:
        """Warn once if the values read so far are not what pixels look like."""
        self._ranges.warn_if_odd()


def read_images(
    X: Any, image_shape: tuple[int, ...] | None = None, check_items: bool = True
) -> ImageSource:
    """Recognise what ``X`` is.

    Parameters
    ----------
    X : sequence of paths, PIL pictures, arrays or tensors, or one array of pictures
        The kinds that the user guide's page on images lists.
    image_shape : tuple of 2 or 3 ints, default=None
        With it ``X`` is an array (n, d) of numbers, and each row a picture
        of this shape.
    check_items : bool, default=True
        Whether an item of a wrong type is refused now, not when it is read.

    Returns
    -------
    ImageSource
        The pictures; nothing is decoded yet.

    Raises
    ------
    TypeError
        If ``X`` is not a sequence of pictures (`ImageTypeError` for one of its items).
    ValueError
        If ``X`` is empty, a single picture, or an array that cannot be pictures.
    """
    if image_shape is not None:
        check_not_masked(X)
        images = rows_as_images(as_pixels(X), image_shape)
        channels_first = _has_channels_first([images.shape[1:]], prefers_first=False)
        return ImageSource(images, channels_first)
    labels = labels_of(X)
    X = unwrap(X)
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUT":
        _check_not_missing(X, labels)
        return _source_of_array(X, prefers_first=False)
    if is_tensor(X):
        return _source_of_array(X, prefers_first=True)
    return _source_of_items(X, labels, check_items)


def _check_not_missing(X: NDArray[Any], labels: Any) -> None:
    """Refuse a column without any value, which pandas makes numbers or dates."""
    if X.ndim == 1 and len(X) and is_missing(X[0]):
        raise _missing(0, labels)


def _missing(index: int, labels: Any) -> ImageTypeError:
    label = label_of(labels, index)
    return ImageTypeError(index, f"a missing value{label}; leave its row out")


def _source_of_array(X: Any, prefers_first: bool) -> ImageSource:
    """Serve one array or tensor of numbers."""
    shape = tuple(X.shape)
    if isinstance(X, np.ndarray) and X.dtype.kind == "S":
        raise ValueError(
            f"Expected {EXPECTED}, got an array of bytes; of file names make texts: "
            "X.astype(str)."
        )
    if len(shape) < 2:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of shape {shape}. Reshape your data."
        )
    if len(shape) == 2:
        example = suggest_image_shape(shape[1])
        raise ValueError(
            f"X has shape {shape}: rows of numbers are pictures only when their shape "
            f"is known. Pass for instance {example}, in the terms of numpy.reshape. "
            "Reshape your data to (n, h, w) if it is a single picture."
        )
    if len(shape) > 4:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of shape {shorten(str(shape))}."
        )
    _check_not_empty(shape)
    if len(shape) == 3:
        _check_not_single_picture(shape, prefers_first)
        return ImageSource(X)
    return ImageSource(X, _has_channels_first([shape[1:]], prefers_first))


def _source_of_items(X: Items, labels: Any, check_items: bool) -> ImageSource:
    """Serve a list of paths, pictures or arrays."""
    if isinstance(X, np.ndarray) and X.ndim != 1:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of {shorten(str(X.dtype), 60)} of "
            f"shape {shorten(str(X.shape))}."
        )
    _check_not_empty((len(X),))
    if _is_row(X[0]):
        return _source_of_array(stacked(X), prefers_first=False)
    arrays = [item for item in X if is_tensor(item) or isinstance(item, np.ndarray)]
    shapes = [tuple(array.shape) for array in arrays if _may_have_channels(array.shape)]
    prefers_first = bool(arrays) and all(is_tensor(array) for array in arrays)
    if check_items:  # before a word about all of them
        ImageSource(X, labels=labels).check_items()
    return ImageSource(X, _has_channels_first(shapes, prefers_first), labels)


def _is_row(item: Any) -> bool:
    """Tell whether an item is a row of numbers, or nested rows."""
    if isinstance(item, (list, tuple)):
        return not any(
            isinstance(part, (str, os.PathLike, Image.Image))
            or getattr(part, "ndim", 0) > 1
            for part in item
        )
    return getattr(item, "ndim", 0) == 1


def check_item(index: int, item: Any) -> None:
    """Refuse an item that cannot be a picture, whatever its pixels."""
    if isinstance(item, os.PathLike) and isinstance(os.fspath(item), bytes):
        raise ImageTypeError(index, "a path of bytes; paths of text are understood")
    if isinstance(item, os.PathLike):
        return
    if isinstance(item, np.ma.MaskedArray):
        raise ImageTypeError(index, "a masked array; fill its masked pixels first")
    if not (isinstance(item, np.ndarray) or is_tensor(item)):
        raise ImageTypeError(index, refuse_item(item))
    fault = _fault_of_shape(tuple(item.shape))
    if fault:
        raise ImageReadError(index, None, fault)


def _fault_of_shape(shape: tuple[int, ...]) -> str:
    """Say why an array of this shape is no image; nothing if it may be one."""
    if len(shape) not in (2, 3):
        found = shorten(str(shape))
        return f"its shape is {found}; expected (h, w) or (h, w, channels)"
    if 0 in shape:
        return f"it is empty: its shape is {shorten(str(shape))}"
    if len(shape) == 2 or _may_have_channels(shape):
        return ""
    return (
        f"no axis of its shape {shorten(str(shape))} can be the channels; expected "
        "1 (grey), 3 (RGB) or 4 (RGBA) of them, last or first"
    )


def _check_not_empty(shape: tuple[int, ...]) -> None:
    if shape[0] == 0:
        # The words of scikit-learn's own check.
        raise ValueError(
            f"Found array with 0 sample(s) (shape={shape}) while a minimum of 1 is "
            "required."
        )
    if 0 in shape:
        raise ValueError(f"The pictures are empty: X has shape {shape}.")


def _check_not_single_picture(shape: tuple[int, ...], prefers_first: bool) -> None:
    """Refuse one colour picture where a stack of grey ones is expected."""
    n_channels = shape[0] if prefers_first else shape[2]
    if n_channels in (3, 4):
        raise ValueError(
            f"X has shape {shape}, which looks like a single colour picture. Reshape "
            "your data: X[None] if it is one, or add an axis of one channel if X is a "
            "stack of grey pictures."
        )


def _may_have_channels(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and (
        shape[0] in CHANNEL_COUNTS or shape[2] in CHANNEL_COUNTS
    )


def _has_channels_first(shapes: Sequence[tuple[int, ...]], prefers_first: bool) -> bool:
    """Decide, for all pictures together, which axis holds the channels."""
    shapes = [shape for shape in shapes if len(shape) == 3]
    if not shapes:
        return False
    can_be_first = all(shape[0] in CHANNEL_COUNTS for shape in shapes)
    can_be_last = all(shape[2] in CHANNEL_COUNTS for shape in shapes)
    if not (can_be_first or can_be_last):
        raise ValueError(
            f"No axis can be the channels in all pictures (shapes {shapes[0]}, ...): "
            "expected 1 (grey), 3 (RGB) or 4 (RGBA) of them, last or first."
        )
    return can_be_first if prefers_first else not can_be_last
