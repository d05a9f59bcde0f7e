"""What texts, items and containers are that hold no images, and what to do instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np

from skltl.exceptions import quote, shorten

# How images begin in base64: JPEG, PNG, GIF, WebP (RIFF), TIFF of both byte orders.
_BASE64_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/_=\s-]{40,200}")

_PATTERN_CHARACTERS = re.compile(r"[*?]|\[.+\]")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_NAMES_SHOWN = 5


def type_name(item: object) -> str:
    """Return the name of an item's class, of a length for people."""
    return shorten(type(item).__name__, 60)


def what_the_text_is(text: str) -> str | None:
    """Say what a text is that names no file, or ``None`` if it may be a path."""
    if text.startswith("data:"):
        return (
            "it is a data URL, not a path; pass Image.open(io.BytesIO("
            "base64.b64decode(url.split(',')[1])))"
        )
    if text.startswith(_BASE64_BEGINNINGS) and _BASE64_TEXT.fullmatch(text[:200]):
        return (
            "it is base64 text, not a path; pass "
            "Image.open(io.BytesIO(base64.b64decode(text)))"
        )
    if _URL.match(text):
        return "it is a URL, not a path; download the file first"
    if _PATTERN_CHARACTERS.search(text):
        return "no such file; to pass all files of a pattern, use glob.glob(pattern)"
    return None


def refuse_text(text: str) -> TypeError:
    """Return the error for one text or path in place of a list of images."""
    example = quote(text)
    if os.path.isdir(text):  # noqa: PTH112  # asks nothing of odd names, unlike Path
        return TypeError(
            f"X is a directory, {example}; pass a list of the files in it, for "
            "instance sorted(pathlib.Path(X).rglob('*.jpg'))."
        )
    if os.path.exists(text):  # noqa: PTH110
        return TypeError(f"X is a single path; put it in a list: X=[{example}].")
    if _PATTERN_CHARACTERS.search(text) and not _URL.match(text):
        return TypeError(
            f"X is a pattern of paths, {example}; pass a list of the files: "
            "sorted(glob.glob(X))."
        )
    if what := what_the_text_is(text):
        return TypeError(f"X is a single text, and {what}, in a list.")
    return TypeError(f"X is a single path; put it in a list: X=[{example}].")


def is_missing(item: object) -> bool:
    """Tell whether an item is what tables hold where nothing is: NaN, NaT, NA, None."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return isinstance(item, (float, np.floating)) and bool(item != item)


def refuse_item(item: object) -> str:
    """Say what an item is that is no image, in the words after "Image 3 is"."""
    if is_missing(item):
        return "a missing value"
    if isinstance(item, (int, float, np.number)):
        return f"a number ({shorten(repr(item), 40)}), not a path or an image"
    if isinstance(item, (bytes, bytearray, memoryview)):
        return (
            "bytes, not a path or an image; pass "
            "PIL.Image.open(io.BytesIO(content)) if they are an image file's content"
        )
    if isinstance(item, Mapping) and {"bytes", "path"} & set(item):
        return (
            "a dictionary of 'bytes' and 'path'; pass "
            "PIL.Image.open(io.BytesIO(item['bytes'])), or its path"
        )
    if hasattr(item, "read") and hasattr(item, "seek"):
        return f"a file object ({type_name(item)}); pass PIL.Image.open(file)"
    if isinstance(item, (list, tuple)):
        return (
            f"a {type_name(item)} of {len(item)} objects, not a path, an image or an "
            "array; of pairs (image, label), pass the images alone"
        )
    return f"of type {type_name(item)}, not a path, an image or an array"


def refuse_container(X: object, expected: str) -> TypeError:
    """Return the error for an ``X`` that is no list, array, series or tensor."""
    begin = f"X must be {expected}; got {type_name(X)}."
    if isinstance(X, (bytes, bytearray, memoryview)):
        return TypeError(f"{begin} Pass [PIL.Image.open(io.BytesIO(X))].")
    if isinstance(X, Mapping):
        return TypeError(f"{begin} Pass list(X.values()) if its values are the images.")
    if isinstance(X, Set):
        return TypeError(f"{begin} A set has no order; pass sorted(X) or list(X).")
    if isinstance(X, (Iterator, Sequence)) or (
        isinstance(X, Sized) and hasattr(X, "__iter__")
    ):
        return TypeError(f"{begin} Pass list(X).")
    if hasattr(X, "__getitem__") and hasattr(X, "__len__"):
        return TypeError(f"{begin} Pass a list of its images, without labels.")
    return TypeError(begin)


def refuse_table(names: Sequence[Any], kind: str) -> ValueError:
    """Return the error for a table of several columns that are not all numbers."""
    shown = [quote(str(name), 30) for name in names[:_NAMES_SHOWN]]
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return ValueError(
        f"X is a {kind} with the columns {', '.join(shown)}{more}. Pass the one that "
        f"holds the images, for instance X[{shown[0]}], or choose it with "
        "sklearn.compose.ColumnTransformer."
    )
