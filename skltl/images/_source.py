"""Recognize what ``X`` is, and serve it as a lazy sequence of RGB images.

The rules are about ``X`` as a whole, never about one item, so that an image does not
change its meaning with its neighbors:

- strings and path-like objects are files;
- an array (n, h, w) holds grey images; in an array of four dimensions, and in a list
  of three-dimensional arrays, the channels are the last axis if it has 1, 3 or 4
  entries, else the one before height. For torch tensors it is the other way round;
- an array (n, d) holds rows of numbers, which are images only with an `image_shape`.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl._caller import level_of_the_user
from skltl._locks import Lock
from skltl.exceptions import ImageRangeWarning, ImageReadError, ImageTypeError, shorten
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
from skltl.images._refusals import (
    is_missing,
    refuse_container,
    refuse_item,
    refuse_table,
    refuse_text,
)
from skltl.images._sharing import one_image

EXPECTED = (
    "a list or 1-D array of paths or images, or an array of shape (n, h, w), "
    "(n, h, w, channels) or (n, channels, h, w)"
)


def unwrap(X: Any) -> Any:
    """Take the data out of its container; refuse what is no batch of images."""
    if isinstance(X, (str, os.PathLike)):
        raise refuse_text(os.fsdecode(X))
    if isinstance(X, Image.Image):
        raise ValueError("X is a single image. Reshape your data: X=[image].")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data cannot be images; pass a dense array.")
    check_not_masked(X)
    if type(X).__module__.partition(".")[0] == "pyarrow":
        return _unwrap_arrow(X)
    if hasattr(X, "to_numpy"):  # pandas, polars
        X = _values_of(X)
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        # One column of paths, as `ColumnTransformer` hands it over.
        return X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
    if isinstance(X, (np.ndarray, list, tuple)) or is_tensor(X):
        return X
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise refuse_container(X, EXPECTED)


def check_not_masked(X: Any) -> None:
    """Refuse a masked array, whose masked pixels have no values."""
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(
            "Masked arrays are not supported: fill the masked pixels first."
        )


def labels_of(X: Any) -> Any:
    """Return the labels of the rows of a pandas object, or ``None``."""
    index = getattr(X, "index", None)
    return index if hasattr(X, "iloc") and hasattr(index, "__getitem__") else None


def label_of(labels: Any, index: int) -> str:
    """Say, for a message, by which label the user knows a row."""
    if labels is None:
        return ""
    label = labels[index]
    if isinstance(label, np.generic):
        label = label.item()
    return f" (index label {shorten(repr(label))})"


def _values_of(X: Any) -> Any:
    """Return the values of a series or a data frame as an array."""
    shape: tuple[int, ...] = getattr(X, "shape", ())
    if len(shape) == 2 and shape[1] == 1:
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X.to_series()
    values = X.to_numpy()
    if values.ndim == 2 and values.dtype.kind in "OUT" and hasattr(X, "columns"):
        raise refuse_table(list(X.columns), type(X).__name__)
    return values


def _unwrap_arrow(X: Any) -> Any:
    """Take texts out of an array or a table of one column of Arrow."""
    if hasattr(X, "column_names"):
        if len(X.column_names) != 1:
            raise refuse_table(X.column_names, f"pyarrow {type(X).__name__}")
        X = X.column(0)
    kind = str(getattr(X, "type", ""))
    if not kind.endswith(("string", "string_view")):
        raise TypeError(
            f"X is a pyarrow {type(X).__name__} of {shorten(kind, 40)}: of Arrow's "
            "types only texts (paths) are read. Pass X.to_pylist() if its items are "
            "images, or X.to_pandas()."
        )
    return X.to_pylist()


def stacked(X: Any) -> NDArray[Any]:
    """Turn nested lists of numbers into one array."""
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise ValueError(
            "X is a list of lists of different lengths. Pass each image as an array."
        ) from error
    if array.dtype.kind not in "buifc":
        raise ValueError(f"Expected {EXPECTED}, got nested lists of {array.dtype}.")
    return array


CHANNEL_COUNTS = (1, 3, 4)


def rows_as_images(rows: NDArray[Any], image_shape: tuple[int, ...]) -> NDArray[Any]:
    """Reshape each row to ``image_shape``, as ``numpy.reshape`` would.

    Parameters
    ----------
    rows : array of shape (n, n_columns)
        One image in each row.
    image_shape : tuple of 2 or 3 ints
        (h, w) or (h, w, channels); one of them may be -1, "whatever is left".

    Returns
    -------
    array of shape (n, *image_shape)
        A view of ``rows`` where numpy can give one.

    Raises
    ------
    ValueError
        If it is no shape of an image, or a row has not as many columns as it needs.
    """
    _check_image_shape(image_shape)
    n_columns = rows.shape[1]
    known = math.prod(size for size in image_shape if size != -1)
    fits = n_columns % known == 0 if -1 in image_shape else n_columns == known
    if not fits:
        raise ValueError(
            f"image_shape={shorten(str(image_shape))} does not fit rows of {n_columns} "
            "numbers."
        )
    return rows.reshape(len(rows), *image_shape)


def as_pixels(rows: NDArray[Any]) -> NDArray[Any]:
    """Bring numbers to types that images have.

    uint8, uint16 and bool say what white is, and stay; all others become float32, with
    the values they have. The byte order becomes this machine's.
    """
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    if rows.dtype in (np.uint8, np.uint16, np.bool_):
        return rows
    return rows.astype(np.float32, copy=False)


def suggest_image_shape(n_columns: int) -> str:
    """Say, as code, which ``image_shape`` rows of this many numbers may have."""
    for n_channels in (1, 3, 4):
        side = math.isqrt(n_columns // n_channels)
        if n_channels * side**2 == n_columns:
            shape = (side, side) if n_channels == 1 else (side, side, n_channels)
            return f"image_shape={shape}"
    return "image_shape=(height, width)"


def _check_image_shape(image_shape: tuple[Any, ...]) -> None:
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


# What resampling with a bicubic filter adds at edges.
_OVERSHOOT = 0.1

# 16-bit images whose largest value is below are likely to hold fewer bits.
_WHITE_16 = 65535
_EIGHTH_OF_16 = 8192


class PixelRanges:
    """The range of all floats, and the largest of all 16-bit values, read so far."""

    def __init__(self) -> None:
        self._floats: tuple[float, float] | None = None
        self._largest_deep: float | None = None
        self._lock = Lock()

    def see(self, decoded: Decoded, is_float: bool) -> None:
        """Take note of an image, whether it was of floats; or else of 8 or 16 bits."""
        if isinstance(decoded, Image.Image):
            if decoded.mode != "F":
                return
            extrema: Any = decoded.getextrema()
            low, high = extrema
        elif decoded.dtype == np.uint8:
            return
        else:
            low, high = float(decoded.min()), float(decoded.max())
        if is_float:
            self.see_floats(low, high)
        else:
            self.see_deep(high)

    def see_floats(self, low: float, high: float) -> None:
        """Take note of the range of an image of floats."""
        with self._lock:
            if self._floats is not None:
                low, high = min(low, self._floats[0]), max(high, self._floats[1])
            self._floats = (low, high)

    def see_deep(self, high: float) -> None:
        """Take note of the largest value, in [0, 1], of an image of 16 bits."""
        with self._lock:
            self._largest_deep = max(high, self._largest_deep or 0.0)

    def warn_if_odd(self) -> None:
        """Warn once if the values seen so far are not what pixels look like."""
        if self._floats is not None and (self._floats[0] < 0 or self._floats[1] > 1):
            low, high = self._floats
            _warn(
                f"Float images should lie in [0, 1], these range from {low:.4g} to "
                f"{high:.4g}. {_remedy(low, high)}"
            )
        if self._largest_deep:
            largest = round(self._largest_deep * _WHITE_16)
            if largest < _EIGHTH_OF_16:
                _warn(
                    "16-bit images should use the values 0 to 65535; the largest one "
                    f"here is {largest}, which is nearly black. {_deep_remedy(largest)}"
                )


def _warn(text: str) -> None:
    warnings.warn(text, ImageRangeWarning, stacklevel=level_of_the_user())


def _remedy(low: float, high: float) -> str:
    """Say what to do with floats of this range."""
    if low < 0:
        return _remedy_for_negatives(low, high)
    if high <= 1 + _OVERSHOOT:
        return "Clip them with np.clip(X, 0, 1)."
    if 8 < high <= 16:
        return "Divide them by 16 if they go from 0 to 16, as scikit-learn's digits do."
    if 16 < high <= 256:
        return "Divide them by 255, or pass them as uint8."
    if 256 < high <= 4096:
        return "Divide them by 4095 if they hold 12 bits; else by the value of white."
    if 4096 < high <= 65536:
        return "Divide them by 65535, or pass them as uint16."
    return "Divide them by the value that stands for white."


def _remedy_for_negatives(low: float, high: float) -> str:
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return "Clip them with np.clip(X, 0, 1)."
    if low >= -1 - _OVERSHOOT and high <= 1 + _OVERSHOOT:
        return "If they are scaled to [-1, 1], pass (X + 1) / 2."
    if low >= -10 and high <= 10:
        return (
            "They look normalized: undo it (X * std + mean), or leave out the "
            "normalization that made them; skltl applies its own."
        )
    return (
        "If a mean was subtracted, add it again; then divide by the value that stands "
        "for white (255 for 8 bits). skltl applies its own normalization."
    )


def _deep_remedy(largest: int) -> str:
    """Say what to do with 16-bit images that are this dark."""
    if largest <= 255:
        return "If they hold 8 bits, pass them as uint8."
    if largest <= 4095:
        return (
            "If they hold 12 bits, scale them by 65535 / 4095, or divide by 4095 and "
            "pass the floats."
        )
    return (
        "If white is not 65535, divide by the value of white and pass the floats, "
        "which are then in [0, 1]."
    )


# Arrays are no `Sequence` to Python, but serve as one here.
Items: TypeAlias = Sequence[Any] | NDArray[Any]


class ImageSource:
    """Images that are decoded when they are asked for.

    Parameters
    ----------
    items : sequence
        Paths, PIL images, arrays or tensors, one for each image.
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
        """Return the same images, decoded at a smaller scale where that is possible.

        Parameters
        ----------
        least_side : int
            No side of an image gets shorter than so many pixels.

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
        """Decode image ``index``: an array (h, w, 3), uint8 or float32."""
        return to_pixels(self.decode(index))

    def decode(self, index: int) -> Decoded:
        """Decode image ``index``: such an array, or a PIL image; see `Decoded`.

        All ways to an image lead through here, which subclasses may exchange.
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
        """Return the path of image ``index``, or ``None`` if it is not a file."""
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
    X : sequence of paths, PIL images, arrays or tensors, or one array of images
        The kinds that the user guide's page on images lists.
    image_shape : tuple of 2 or 3 ints, default=None
        With it ``X`` is an array (n, d) of numbers, and each row an image
        of this shape.
    check_items : bool, default=True
        Whether an item of a wrong type is refused now, not when it is read.

    Returns
    -------
    ImageSource
        The images; nothing is decoded yet.

    Raises
    ------
    TypeError
        If ``X`` is not a sequence of images (`ImageTypeError` for one of its items).
    ValueError
        If ``X`` is empty, a single image, or an array that cannot be images.
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
            f"X has shape {shape}: rows of numbers are images only when their shape "
            f"is known. Pass for instance {example}, in the terms of numpy.reshape. "
            "Reshape your data to (n, h, w) if it is a single image."
        )
    if len(shape) > 4:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of shape {shorten(str(shape))}."
        )
    _check_not_empty(shape)
    if len(shape) == 3:
        _check_not_single_image(shape, prefers_first)
        return ImageSource(X)
    return ImageSource(X, _has_channels_first([shape[1:]], prefers_first))


def _source_of_items(X: Items, labels: Any, check_items: bool) -> ImageSource:
    """Serve a list of paths, images or arrays."""
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
    """Refuse an item that cannot be an image, whatever its pixels."""
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
        raise ValueError(f"The images are empty: X has shape {shape}.")


def _check_not_single_image(shape: tuple[int, ...], prefers_first: bool) -> None:
    """Refuse one colour image where a stack of grey ones is expected."""
    n_channels = shape[0] if prefers_first else shape[2]
    if n_channels in (3, 4):
        raise ValueError(
            f"X has shape {shape}, which looks like a single colour image. Reshape "
            "your data: X[None] if it is one, or add an axis of one channel if X is a "
            "stack of grey images."
        )


def _may_have_channels(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and (
        shape[0] in CHANNEL_COUNTS or shape[2] in CHANNEL_COUNTS
    )


def _has_channels_first(shapes: Sequence[tuple[int, ...]], prefers_first: bool) -> bool:
    """Decide, for all images together, which axis holds the channels."""
    shapes = [shape for shape in shapes if len(shape) == 3]
    if not shapes:
        return False
    can_be_first = all(shape[0] in CHANNEL_COUNTS for shape in shapes)
    can_be_last = all(shape[2] in CHANNEL_COUNTS for shape in shapes)
    if not (can_be_first or can_be_last):
        raise ValueError(
            f"No axis can be the channels in all images (shapes {shapes[0]}, ...): "
            "expected 1 (grey), 3 (RGB) or 4 (RGBA) of them, last or first."
        )
    return can_be_first if prefers_first else not can_be_last
