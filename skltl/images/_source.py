"""Recognize what ``X`` is, and provide it as a lazy sequence of RGB images.

The rules are about ``X`` as a whole, never about one item, so that the meaning of an
image does not depend on its neighbors:

- strings and path-like objects are files;
- an array (n, h, w) holds gray images; in an array of four dimensions, and in a list
  of three-dimensional arrays, the channels are the last axis if it has 1, 3 or 4
  entries, else the one before height. For torch tensors it is the other way round;
- an array (n, d) holds rows of pixels, which are images only with an `image_shape`.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl._caller import user_stacklevel
from skltl._locks import Lock
from skltl.exceptions import (
    ImageRangeWarning,
    ImageReadError,
    ImageTypeError,
    quote,
    shorten,
)
from skltl.images._decode import (
    Decoded,
    Pixels,
    describe_text,
    is_tensor,
    one_image,
    read_array,
    read_file,
    read_image,
    tensor_to_array,
    to_pixels,
)

# Arrays are no `Sequence` to Python, but serve as one here.
Items: TypeAlias = Sequence[Any] | NDArray[Any]

CHANNEL_COUNTS = (1, 3, 4)

EXPECTED = (
    "a list or 1-D array of paths or images, or an array of shape (n, h, w), "
    "(n, h, w, channels) or (n, channels, h, w)"
)

N_COLUMNS_SHOWN = 5


class ImageSource:
    """Images that are decoded on access: paths, PIL images, arrays or tensors.

    Items of three dimensions are (channels, h, w) if `channels_first`. `labels` are the
    index labels by which the user knows the items, if any.
    """

    def __init__(
        self, items: Items, channels_first: bool = False, labels: Any = None
    ) -> None:
        self._items = items
        self._channels_first = channels_first
        self._labels = labels
        self.ranges = PixelRanges()
        self.least_side: int | None = None

    def reduced_to(self, least_side: int) -> ImageSource:
        """Return the same images, decoded at a smaller scale where possible.

        Both sides of each image keep at least `least_side` pixels.
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
        """Decode image ``index`` to an array or a PIL image; see `Decoded`.

        All other access to the images goes through this method, which subclasses may
        override.
        """
        item = self._items[index]
        self._check(int(index), item)
        try:
            if isinstance(item, np.ndarray):  # already in memory
                return self._read(item)
            with one_image():
                return self._read(item)
        except ValueError as error:
            cause = error.__cause__ or error
            raise ImageReadError(int(index), self.path(index), str(error)) from cause

    def path(self, index: int) -> str | None:
        """Return the path of image ``index``, or ``None`` if it is not a file."""
        item = self._items[index]
        if not isinstance(item, (str, os.PathLike)):
            return None
        return str(os.fspath(item))  # numpy's strings have another `repr`

    def check_items(self) -> None:
        """Raise an error for the first item that cannot be an image by its type."""
        for index, item in enumerate(self._items):
            self._check(index, item)

    def warn_of_odd_range(self) -> None:
        """Warn once if the values read so far are unusual for pixels."""
        self.ranges.warn_if_odd()

    def _check(self, index: int, item: Any) -> None:
        """Raise an error if an item cannot be an image, whatever its pixels."""
        if isinstance(item, (str, Image.Image)):
            return
        if isinstance(item, os.PathLike):
            if isinstance(os.fspath(item), bytes):
                raise ImageTypeError(index, "a path of bytes; expected a path of str")
        elif isinstance(item, np.ma.MaskedArray):
            raise ImageTypeError(index, "a masked array; fill its masked pixels first")
        elif isinstance(item, np.ndarray) or is_tensor(item):
            if fault := _fault_of_shape(tuple(item.shape)):
                raise ImageReadError(index, None, fault)
        elif _is_missing(item):
            raise _missing_value(index, self._labels)
        else:
            raise ImageTypeError(index, _describe_item(item))

    def _read(self, item: Any) -> Decoded:
        """Decode an item and add its range to those of the source."""
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
        found = _range_of(decoded)
        if found is not None:
            self.ranges.add("floats" if is_float else "16-bit", *found)
        return decoded


def read_images(
    X: Any, image_shape: tuple[int, ...] | None = None, check_items: bool = True
) -> ImageSource:
    """Recognize what ``X`` is; nothing is decoded yet.

    With `image_shape`, ``X`` is an array (n, d), and each row an image of this shape.
    Without `check_items`, an item of a wrong type is an error only when it is read.
    An ``X`` that is no sequence of images raises ``TypeError`` (`ImageTypeError` for
    one of its items); if it is empty, a single image or of a wrong shape,
    ``ValueError``.
    """
    if image_shape is not None:
        check_not_masked(X)
        images = _rows_as_images(X, image_shape)
        channels_first = _has_channels_first([images.shape[1:]], prefers_first=False)
        return ImageSource(images, channels_first)
    index = getattr(X, "index", None)  # of pandas
    labels = index if hasattr(X, "iloc") and hasattr(index, "__getitem__") else None
    X = _unwrap(X)
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUT":
        # A column without any value, which pandas stores as floats or dates.
        if X.ndim == 1 and len(X) and _is_missing(X[0]):
            raise _missing_value(0, labels)
        return _source_of_array(X, prefers_first=False)
    if is_tensor(X):
        return _source_of_array(X, prefers_first=True)
    return _source_of_items(X, labels, check_items)


def check_not_masked(X: Any) -> None:
    """Raise an error for a masked array, whose masked pixels have no values."""
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(
            "Masked arrays are not supported: fill the masked pixels first."
        )


def _unwrap(X: Any) -> Any:
    """Take the data out of its container; refuse what is no batch of images."""
    if isinstance(X, (str, os.PathLike)):
        raise _single_path(os.fsdecode(X))
    if isinstance(X, Image.Image):
        raise ValueError("X is a single image. Reshape your data: X=[image].")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data cannot be images; pass a dense array.")
    check_not_masked(X)
    if type(X).__module__.partition(".")[0] == "pyarrow":
        return _unwrap_arrow(X)
    if hasattr(X, "to_numpy"):  # pandas, polars
        X = _unwrap_frame(X)
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        # One column of paths, as `ColumnTransformer` passes it.
        return X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
    if isinstance(X, (np.ndarray, list, tuple)) or is_tensor(X):
        return X
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise TypeError(
        f"X must be {EXPECTED}; got {_type_name(X)}.{_advice_on_container(X)}"
    )


def _unwrap_frame(X: Any) -> Any:
    """Return the values of a series or a data frame as an array."""
    shape: tuple[int, ...] = getattr(X, "shape", ())
    if len(shape) == 2 and shape[1] == 1:
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X.to_series()
    values = X.to_numpy()
    if values.ndim == 2 and values.dtype.kind in "OUT" and hasattr(X, "columns"):
        raise _several_columns(list(X.columns), type(X).__name__)
    return values


def _unwrap_arrow(X: Any) -> Any:
    """Return the strings of an Arrow array or of a table of one column."""
    if hasattr(X, "column_names"):
        if len(X.column_names) != 1:
            raise _several_columns(X.column_names, f"pyarrow {type(X).__name__}")
        X = X.column(0)
    kind = str(getattr(X, "type", ""))
    if not kind.endswith(("string", "string_view")):
        raise TypeError(
            f"X is a pyarrow {type(X).__name__} of {shorten(kind, 40)}: only strings "
            "(paths) are supported. Pass X.to_pylist() if its items are images, or "
            "X.to_pandas()."
        )
    return X.to_pylist()


def _single_path(text: str) -> TypeError:
    """Return the error for a string or path instead of a list."""
    example = quote(text)
    if os.path.isdir(text):  # noqa: PTH112  # accepts odd names, unlike Path
        return TypeError(
            f"X is a directory, {example}; pass a list of the files in it, for "
            "instance sorted(pathlib.Path(X).rglob('*.jpg'))."
        )
    if not os.path.exists(text) and (what := describe_text(text)):  # noqa: PTH110
        return TypeError(f"X is a string, {example}, not a list, and {what}.")
    return TypeError(f"X is a single path; put it in a list: X=[{example}].")


def _several_columns(names: Sequence[Any], kind: str) -> ValueError:
    """Return the error for a table of several columns that are not all numeric."""
    shown = [quote(str(name), 30) for name in names[:N_COLUMNS_SHOWN]]
    more = ", ..." if len(names) > N_COLUMNS_SHOWN else ""
    return ValueError(
        f"X is a {kind} with the columns {', '.join(shown)}{more}. Pass the one that "
        f"holds the images, for instance X[{shown[0]}], or select it with "
        "sklearn.compose.ColumnTransformer."
    )


def _advice_on_container(X: object) -> str:
    """Return advice on what to pass instead of an unsupported container."""
    if isinstance(X, (bytes, bytearray, memoryview)):
        return " Pass [PIL.Image.open(io.BytesIO(X))]."
    if isinstance(X, Mapping):
        return " Pass list(X.values()) if its values are the images."
    if isinstance(X, Set):
        return " A set has no order; pass sorted(X) or list(X)."
    if isinstance(X, (Iterator, Sequence)) or (
        isinstance(X, Sized) and hasattr(X, "__iter__")
    ):
        return " Pass list(X)."
    if hasattr(X, "__getitem__") and hasattr(X, "__len__"):
        return " Pass a list of its images, without labels."
    return ""


def _source_of_items(X: Items, labels: Any, check_items: bool) -> ImageSource:
    """Return the source of a list of paths, images or arrays."""
    if isinstance(X, np.ndarray) and X.ndim != 1:
        raise ValueError(
            f"Expected {EXPECTED}, got an array of {shorten(str(X.dtype), 60)} of "
            f"shape {shorten(str(X.shape))}."
        )
    _check_not_empty((len(X),))
    if _is_row(X[0]):
        return _source_of_array(_stack(X), prefers_first=False)
    arrays = [item for item in X if is_tensor(item) or isinstance(item, np.ndarray)]
    shapes = [tuple(array.shape) for array in arrays if _may_have_channels(array.shape)]
    prefers_first = bool(arrays) and all(is_tensor(array) for array in arrays)
    if check_items:  # an error about one item comes before one about all of them
        ImageSource(X, labels=labels).check_items()
    return ImageSource(X, _has_channels_first(shapes, prefers_first), labels)


def _is_row(item: Any) -> bool:
    """Return whether an item is a row of pixels, or nested rows."""
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


def _is_missing(item: object) -> bool:
    """Return whether an item is a missing value: None, NaN, NaT or NA."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return isinstance(item, (float, np.floating)) and bool(item != item)


def _missing_value(index: int, labels: Any) -> ImageTypeError:
    """Return the error for a missing value, with its index label if there is one."""
    name = ""
    if labels is not None:
        label = labels[index]
        label = label.item() if isinstance(label, np.generic) else label
        name = f" (index label {shorten(repr(label))})"
    return ImageTypeError(index, f"a missing value{name}; drop its row")


def _describe_item(item: object) -> str:
    """Describe an item that is no image, as the end of "Image 3 is ..."."""
    if isinstance(item, (int, float, np.number)):
        return f"a number ({shorten(repr(item), 40)}), not a path or an image"
    if isinstance(item, (bytes, bytearray, memoryview)):
        return (
            "bytes, not a path or an image; pass "
            "PIL.Image.open(io.BytesIO(content)) if they are the content of a file"
        )
    if isinstance(item, Mapping) and {"bytes", "path"} & set(item):
        return (
            "a dictionary of 'bytes' and 'path'; pass "
            "PIL.Image.open(io.BytesIO(item['bytes'])), or its path"
        )
    if hasattr(item, "read") and hasattr(item, "seek"):
        return f"a file object ({_type_name(item)}); pass PIL.Image.open(file)"
    if isinstance(item, (list, tuple)):
        return (
            f"a {_type_name(item)} of {len(item)} objects, not a path, an image or an "
            "array; of pairs (image, label), pass the images alone"
        )
    return f"of type {_type_name(item)}, not a path, an image or an array"


def _type_name(item: object) -> str:
    """Return the name of an item's class, shortened."""
    return shorten(type(item).__name__, 60)


def _source_of_array(X: Any, prefers_first: bool) -> ImageSource:
    """Return the source of one numeric array or tensor."""
    shape = tuple(X.shape)
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
            f"for instance {_suggest_image_shape(shape[1])}, as in numpy.reshape. "
            "Reshape your data to (n, h, w) if it is a single image."
        )
    _check_not_empty(shape)
    if len(shape) == 4:
        return ImageSource(X, _has_channels_first([shape[1:]], prefers_first))
    if shape[0 if prefers_first else 2] in (3, 4):
        raise ValueError(
            f"X has shape {shape}, which looks like a single color image. Reshape "
            "your data: X[None] if it is one, or add an axis of one channel if X is a "
            "stack of gray images."
        )
    return ImageSource(X)


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


def _fault_of_shape(shape: tuple[int, ...]) -> str:
    """Return why an array of this shape is no image, or "" if it may be one."""
    if len(shape) not in (2, 3):
        found = shorten(str(shape))
        return f"its shape is {found}; expected (h, w) or (h, w, channels)"
    if 0 in shape:
        return f"it is empty: its shape is {shorten(str(shape))}"
    if len(shape) == 2 or _may_have_channels(shape):
        return ""
    return (
        f"no axis of its shape {shorten(str(shape))} can be the channels; expected "
        "1 (gray), 3 (RGB) or 4 (RGBA) of them, last or first"
    )


def _may_have_channels(shape: tuple[int, ...]) -> bool:
    """Return whether the first or last of three axes can be the channels."""
    return len(shape) == 3 and (
        shape[0] in CHANNEL_COUNTS or shape[2] in CHANNEL_COUNTS
    )


def _has_channels_first(shapes: Sequence[tuple[int, ...]], prefers_first: bool) -> bool:
    """Decide which axis holds the channels, for all images together."""
    shapes = [shape for shape in shapes if len(shape) == 3]
    if not shapes:
        return False
    can_be_first = all(shape[0] in CHANNEL_COUNTS for shape in shapes)
    can_be_last = all(shape[2] in CHANNEL_COUNTS for shape in shapes)
    if not (can_be_first or can_be_last):
        raise ValueError(
            f"No axis can be the channels in all images (shapes {shapes[0]}, ...): "
            "expected 1 (gray), 3 (RGB) or 4 (RGBA) of them, last or first."
        )
    return can_be_first if prefers_first else not can_be_last


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


def _suggest_image_shape(n_columns: int) -> str:
    """Return, as code, a possible ``image_shape`` for rows of this length."""
    for n_channels in CHANNEL_COUNTS:
        side = math.isqrt(n_columns // n_channels)
        if n_channels * side**2 == n_columns:
            shape = (side, side) if n_channels == 1 else (side, side, n_channels)
            return f"image_shape={shape}"
    return "image_shape=(height, width)"


# Advice for float images: the first whose limits hold the range of their values. The
# slack of 0.1 is the overshoot of bicubic resampling at edges.
FLOAT_ADVICE = [
    ((-0.1, 1.1), "Clip them with np.clip(X, 0, 1)."),
    ((0, 8), "Divide them by the value of white."),
    ((0, 16), "Divide them by 16 if that is white, as in scikit-learn's digits."),
    ((0, 256), "Divide them by 255, or pass them as uint8."),
    ((0, 4096), "Divide them by 4095 for 12 bits, else by the value of white."),
    ((0, 65536), "Divide them by 65535, or pass them as uint16."),
    ((0, math.inf), "Divide them by the value of white."),
    ((-1.1, 1.1), "If they are scaled to [-1, 1], pass (X + 1) / 2."),
    (
        (-10, 10),
        "They look normalized: pass X * std + mean, or skip the normalization that "
        "produced them; skltl applies its own.",
    ),
    (
        (-math.inf, math.inf),
        "If a mean was subtracted, add it again; then divide by the value of white "
        "(255 for 8 bits). skltl applies its own normalization.",
    ),
]

# Advice for 16-bit images by their largest value. Images that do not reach an eighth of
# the range probably hold fewer bits.
SIXTEEN_BIT_ADVICE = [
    (255, "If they hold 8 bits, pass them as uint8."),
    (4095, "If they hold 12 bits, divide them by 4095 and pass the floats."),
    (8191, "If white is not 65535, divide them by its value and pass the floats."),
]


class PixelRanges:
    """Ranges of the float and of the 16-bit images read so far, by any thread.

    `warned` is the advice given so far.
    """

    def __init__(
        self, subject: str = "Float images", warned: set[str] | None = None
    ) -> None:
        self.warned = set() if warned is None else warned
        self._subject = subject
        self._ranges: dict[str, tuple[float, float]] = {}
        self._lock = Lock()

    def add(self, kind: str, low: float, high: float) -> None:
        """Widen the range of a kind of images: "floats" or "16-bit"."""
        with self._lock:
            known_low, known_high = self._ranges.get(kind, (low, high))
            self._ranges[kind] = (min(low, known_low), max(high, known_high))

    def warn_if_odd(self) -> None:
        """Warn about unusual ranges, once with each advice."""
        low, high = self._ranges.get("floats", (0, 1))
        if low < 0 or high > 1:
            remedy = next(
                advice
                for (least, most), advice in FLOAT_ADVICE
                if least <= low and high <= most
            )
            self._warn_once(
                remedy,
                f"{self._subject} should lie in [0, 1], these range from {low:.4g} to "
                f"{high:.4g}. {remedy}",
            )
        largest = round(self._ranges.get("16-bit", (0, 1))[1] * 65535)
        fitting = [advice for most, advice in SIXTEEN_BIT_ADVICE if largest <= most]
        if largest and fitting:
            self._warn_once(
                fitting[0],
                "16-bit images should use the values 0 to 65535; the largest one here "
                f"is {largest}, which is nearly black. {fitting[0]}",
            )

    def _warn_once(self, advice: str, message: str) -> None:
        """Give an `ImageRangeWarning` that points to the user's code."""
        if advice not in self.warned:
            self.warned.add(advice)
            warnings.warn(message, ImageRangeWarning, stacklevel=user_stacklevel())


def _range_of(decoded: Decoded) -> tuple[float, float] | None:
    """Return the range of a float image, or ``None`` if it has 8 bits per channel."""
    if isinstance(decoded, np.ndarray):
        is_float = decoded.dtype != np.uint8
        return (float(decoded.min()), float(decoded.max())) if is_float else None
    if decoded.mode != "F":
        return None
    extrema: Any = decoded.getextrema()
    low, high = extrema
    return low, high
