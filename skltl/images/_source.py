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
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl._caller import level_of_the_user
from skltl.exceptions import ImageRangeWarning, ImageReadError, ImageTypeError
from skltl.images._decode import (
    Decoded,
    Pixels,
    is_tensor,
    read_array,
    read_file,
    read_picture,
    tensor_to_array,
    to_pixels,
)
from skltl.images._rows import (
    CHANNEL_COUNTS,
    as_pixels,
    rows_as_images,
    suggest_image_shape,
)

# Arrays are no `Sequence` to Python, but serve as one here.
Items: TypeAlias = Sequence[Any] | NDArray[Any]

_EXPECTED = (
    "a list or 1-D array of paths or pictures, or an array of shape (n, h, w), "
    "(n, h, w, channels) or (n, channels, h, w)"
)


# Pillow loads a picture from its file when it is first used. The same one may stand at
# several places and in several sources, and must not be loaded by two threads at once.
_PICTURE_LOCK = threading.Lock()


class ImageSource:
    """Pictures that are decoded when they are asked for.

    Parameters
    ----------
    items : sequence
        Paths, PIL pictures, arrays or tensors, one for each picture.
    channels_first : bool, default=False
        Whether three-dimensional items are (channels, h, w).
    checks_range : bool, default=True
        Whether floats outside [0, 1] are worth a warning.
    """

    def __init__(
        self,
        items: Items,
        channels_first: bool = False,
        checks_range: bool = True,
    ) -> None:
        self._items = items
        self._channels_first = channels_first
        self._checks_range = checks_range
        self.least_side: int | None = None
        self._seen_range: tuple[float, float] | None = None
        self._lock = threading.Lock()  # for what decoding threads share

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
        """Decode picture ``index``: such an array, or a PIL picture in mode RGB.

        All ways to a picture lead through here, which subclasses may exchange.
        """
        item = self._items[index]
        check_item(int(index), item)
        try:
            return self._read(item)
        except ValueError as error:
            cause = error.__cause__ or error
            raise ImageReadError(int(index), self.path(index), str(error)) from cause

    def path(self, index: int) -> str | None:
        """Return the path of picture ``index``, or ``None`` if it is not a file."""
        item = self._items[index]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else None

    def _read(self, item: Any) -> Decoded:
        if isinstance(item, (str, os.PathLike)):
            return read_file(item, self.least_side)
        if isinstance(item, Image.Image):
            with _PICTURE_LOCK:
                return read_picture(item)
        array = tensor_to_array(item) if is_tensor(item) else np.asarray(item)
        if array.ndim == 3 and self._channels_first:
            array = np.moveaxis(array, 0, 2)
        pixels = read_array(array)
        if self._checks_range and pixels.dtype != np.uint8:
            self._widen_seen_range(float(pixels.min()), float(pixels.max()))
        return pixels

    def _widen_seen_range(self, low: float, high: float) -> None:
        with self._lock:
            if self._seen_range is not None:
                low = min(low, self._seen_range[0])
                high = max(high, self._seen_range[1])
            self._seen_range = (low, high)

    def warn_of_odd_range(self) -> None:
        """Warn once if floats outside [0, 1] have been read so far."""
        if self._seen_range is None:
            return
        low, high = self._seen_range
        if low < 0 or high > 1:
            warnings.warn(
                f"Pictures of floats should lie in [0, 1], these go from {low:.4g} to "
                f"{high:.4g}. Divide them by their maximum (255 for 8-bit pictures), "
                "or pass them as uint8.",
                ImageRangeWarning,
                stacklevel=level_of_the_user(),
            )


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
        images = rows_as_images(as_pixels(X), image_shape)
        channels_first = _has_channels_first([images.shape[1:]], prefers_first=False)
        # Integers of a type that does not say what white is often go from 0 to 255.
        return ImageSource(images, channels_first, checks_range=X.dtype.kind in "iu")
    X = _unwrap(X)
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUT":
        return _source_of_array(X, prefers_first=False)
    if is_tensor(X):
        return _source_of_array(X, prefers_first=True)
    return _source_of_items(X, check_items)


def _unwrap(X: Any) -> Any:
    """Take the data out of its container; refuse what is no batch of pictures."""
    if isinstance(X, (str, os.PathLike)):
        raise TypeError(f"X is a single path; put it in a list: X=[{X!r}].")
    if isinstance(X, Image.Image):
        raise ValueError("X is a single picture. Reshape your data: X=[picture].")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data cannot be pictures; pass a dense array.")
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(
            "Masked arrays are not supported: fill the masked pixels first."
        )
    if hasattr(X, "to_numpy"):  # pandas, polars
        shape: tuple[int, ...] = getattr(X, "shape", ())
        if len(shape) == 2 and shape[1] == 1:
            X = X.iloc[:, 0] if hasattr(X, "iloc") else X.to_series()
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        # One column of paths, as `ColumnTransformer` hands it over.
        return X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
    if isinstance(X, (np.ndarray, list, tuple)) or is_tensor(X):
        return X
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise TypeError(f"X must be {_EXPECTED}; got {type(X).__name__}.")


def _source_of_array(X: Any, prefers_first: bool) -> ImageSource:
    """Serve one array or tensor of numbers."""
    shape = tuple(X.shape)
    if len(shape) < 2:
        raise ValueError(
            f"Expected {_EXPECTED}, got an array of shape {shape}. Reshape your data."
        )
    if len(shape) == 2:
        example = suggest_image_shape(shape[1])
        raise ValueError(
            f"X has shape {shape}: rows of numbers are pictures only when their shape "
            f"is known. Pass for instance {example}, in the terms of numpy.reshape. "
            "Reshape your data to (n, h, w) if it is a single picture."
        )
    if len(shape) > 4:
        raise ValueError(f"Expected {_EXPECTED}, got an array of shape {shape}.")
    _check_not_empty(shape)
    if len(shape) == 3:
        _check_not_single_picture(shape, prefers_first)
        return ImageSource(X)
    return ImageSource(X, _has_channels_first([shape[1:]], prefers_first))


def _source_of_items(X: Items, check_items: bool) -> ImageSource:
    """Serve a list of paths, pictures or arrays."""
    if isinstance(X, np.ndarray) and X.ndim != 1:
        raise ValueError(
            f"Expected {_EXPECTED}, got an array of {X.dtype} of shape {X.shape}."
        )
    _check_not_empty((len(X),))
    if check_items and isinstance(X[0], (int, float, np.number)):
        raise ImageTypeError(0, f"a number ({X[0]!r}), not a path or a picture")
    if isinstance(X[0], (list, tuple)) or getattr(X[0], "ndim", 0) == 1:
        return _source_of_array(_stacked(X), prefers_first=False)
    if check_items:
        for index, item in enumerate(X):
            check_item(index, item)
    arrays = [item for item in X if is_tensor(item) or isinstance(item, np.ndarray)]
    shapes = [tuple(array.shape) for array in arrays if _may_have_channels(array.shape)]
    prefers_first = bool(arrays) and all(is_tensor(array) for array in arrays)
    return ImageSource(X, _has_channels_first(shapes, prefers_first))


def _stacked(X: Items) -> NDArray[Any]:
    """Turn nested lists of numbers into one array."""
    try:
        stacked = np.asarray(X)
    except ValueError as error:
        raise ValueError(
            "X is a list of lists of different lengths. Pass each picture as an array."
        ) from error
    if stacked.dtype.kind not in "buifc":
        raise ValueError(f"Expected {_EXPECTED}, got nested lists of {stacked.dtype}.")
    return stacked


def check_item(index: int, item: Any) -> None:
    """Refuse an item that cannot be a picture, whatever its pixels."""
    if isinstance(item, os.PathLike) and isinstance(os.fspath(item), bytes):
        raise ImageTypeError(index, "a path of bytes; paths of text are understood")
    if isinstance(item, (str, os.PathLike, Image.Image)):
        return
    if isinstance(item, np.ma.MaskedArray):
        raise ImageTypeError(index, "a masked array; fill its masked pixels first")
    if not (isinstance(item, np.ndarray) or is_tensor(item)):
        raise ImageTypeError(
            index, f"of type {type(item).__name__}, not a path, a picture or an array"
        )
    shape = tuple(item.shape)
    if len(shape) not in (2, 3):
        raise ImageReadError(
            index, None, f"its shape is {shape}; expected (h, w) or (h, w, channels)"
        )
    if 0 in shape:
        raise ImageReadError(index, None, f"it is empty: its shape is {shape}")
    if len(shape) == 3 and not _may_have_channels(shape):
        raise ImageReadError(
            index,
            None,
            f"no axis of its shape {shape} can be the channels; expected 1 (grey), "
            "3 (RGB) or 4 (RGBA) of them, last or first",
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
