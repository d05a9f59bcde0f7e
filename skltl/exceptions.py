"""Error and warning classes of skltl.

::

    Exception
    ├── ValueError
    │   ├── EngineError           the engine cannot run on this machine
    │   ├── ExportError           an estimator cannot be exported, or its export differs
    │   ├── ImageReadError        an item of X cannot be read as an image
    │   ├── NonFiniteFeaturesError   the features of an image are NaN or infinite
    │   ├── TrainingError         the loss is NaN or infinite
    │   ├── UnknownBackboneError  no backbone has this name
    │   ├── UnknownLayerError     the backbone has no such layer
    │   └── WeightsError          a weights file is incompatible or unsafe
    │       └── WeightsNotFoundError   weights are neither local nor downloadable
    ├── TypeError
    │   └── ImageTypeError        an item of X has a type that holds no image
    └── ImageError                base class of the errors that concern an item of X:
                                  ImageReadError, ImageTypeError, NonFiniteFeaturesError
    UserWarning
    ├── BadImageWarning           images that cannot be read were dropped
    ├── CacheWarning              features cannot be stored or read again
    ├── CheckpointWarning         the state of a fit cannot be saved
    ├── EngineWarning             the engine differs from that used in fit
    ├── ImageFolderWarning        files or folders are not loaded as images
    ├── ImageRangeWarning         pixel values are outside the expected range
    ├── InterruptionWarning       training was interrupted, and its result is kept
    ├── LicenseWarning            weights do not permit commercial use
    ├── PersistenceWarning        the fitted estimator cannot be saved
    └── PrecisionWarning          float32 is used instead of bfloat16

They inherit from the built-in classes that scikit-learn raises, so that
``GridSearchCV(error_score=...)`` and existing ``except`` clauses apply to them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

__all__ = [
    "BadImageWarning",
    "CacheWarning",
    "CheckpointWarning",
    "EngineError",
    "EngineWarning",
    "ExportError",
    "ImageError",
    "ImageFolderWarning",
    "ImageRangeWarning",
    "ImageReadError",
    "ImageTypeError",
    "InterruptionWarning",
    "LicenseWarning",
    "NonFiniteFeaturesError",
    "PersistenceWarning",
    "PrecisionWarning",
    "TrainingError",
    "UnknownBackboneError",
    "UnknownLayerError",
    "WeightsError",
    "WeightsNotFoundError",
]


# Maximum length of a message, whatever names it contains.
MOST_CHARACTERS = 480

MAX_NAMES_IN_MESSAGE = 12


def shorten(text: str, n_characters: int = 80) -> str:
    """Replace the middle of a long text by "..." to keep messages readable."""
    if len(text) <= n_characters:
        return text
    n_first = (n_characters - 3) // 3
    return f"{text[:n_first]}...{text[n_first + 3 - n_characters :]}"


def quote(text: str, n_characters: int = 80) -> str:
    """Return the ``repr`` of a text, shortened."""
    return shorten(repr(shorten(text, n_characters)), n_characters)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint to similar known names, or else a list of known names."""
    names = list(known)
    shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE])
    more = ", ..." if len(names) > MAX_NAMES_IN_MESSAGE else ""
    return did_you_mean(name, names) or f"Known: {shown}{more}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the most similar names, or an empty string."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    names = " or ".join(repr(by_lower[one]) for one in found)
    return f"Did you mean {names}?" if names else ""


class BadImageWarning(UserWarning):
    """Images that cannot be read were dropped; the message names the first ones."""


class CacheWarning(UserWarning):
    """The feature cache is damaged, full or not writable; results are unaffected."""


class CheckpointWarning(UserWarning):
    """The state of a fit cannot be saved; training continues without checkpoints."""


class EngineError(ValueError):
    """The engine cannot run the network on this machine."""


class EngineWarning(UserWarning):
    """The network runs with another engine than in ``fit``.

    Features differ in the last digits.
    """


class ExportError(ValueError):
    """An estimator cannot be exported, or its export computes something else."""


class ImageFolderWarning(UserWarning):
    """Files or class folders in a folder of images are left out."""


class ImageRangeWarning(UserWarning):
    """Pixel values are outside the expected range, so that features are unreliable.

    Floats are outside [0, 1], or 16-bit values are below an eighth of 65535. The
    message gives the range and a remedy.
    """


class ImageError(Exception):
    """An error that concerns an item of ``X``; `index` is its index."""

    index: int

    def moved_to(self, index: int) -> Self:
        """Return the error for the index of the same item in another sequence.

        It has the notes of this one. Raise it from ``error.__cause__``.
        """
        moved = type(self)(index, *self.args[1:])
        for note in getattr(self, "__notes__", ()):
            moved.add_note(note)
        return moved


class ImageReadError(ImageError, ValueError):
    """An item of ``X`` cannot be read as an image.

    Parameters
    ----------
    index : int
        Index of the item in ``X``.
    path : str or None
        Path, URL or name of the item; ``None`` if it has none.
    reason : str
        Reason why it cannot be read.

    Attributes
    ----------
    index, path, reason
        The parameters. The decoder's own error, if any, is ``__cause__``.
    """

    def __init__(self, index: int, path: str | None, reason: str) -> None:
        # joblib pickles the errors of its workers, and an error is rebuilt from `args`.
        super().__init__(index, path, reason)
        self.index = index
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        # A path may be long on purpose; the attributes are complete.
        name = "" if self.path is None else f" ({quote(self.path, 120)})"
        reason = shorten(self.reason, 300)
        return f"Image {self.index}{name} could not be read: {reason}."


class ImageTypeError(ImageError, TypeError):
    """An item of ``X`` has a type that cannot hold an image.

    Parameters
    ----------
    index : int
        Index of the item in ``X``.
    reason : str
        Description of the item and of what was expected.

    Attributes
    ----------
    index, reason
        The parameters.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"Image {self.index} is {shorten(self.reason, 400)}."


class InterruptionWarning(UserWarning):
    """Training was interrupted, and the result of the epochs until then is kept."""


class LicenseWarning(UserWarning):
    """The license of pretrained weights does not permit commercial use."""


class NonFiniteFeaturesError(ImageError, ValueError):
    """The features of an image are NaN or infinite.

    The weights of the network, or the values of the image, are too large.

    Parameters
    ----------
    index : int
        Index of the image in ``X``.
    path : str or None
        Path, URL or name of the image; ``None`` if it has none.

    Attributes
    ----------
    index, path
        The parameters.
    """

    def __init__(self, index: int, path: str | None) -> None:
        super().__init__(index, path)
        self.index = index
        self.path = path

    def __str__(self) -> str:
        name = "" if self.path is None else f" ({quote(self.path, 120)})"
        return (
            f"The features of image {self.index}{name} are NaN or infinite: the "
            "weights of the network, or the values of the image, are too large."
        )


class PersistenceWarning(UserWarning):
    """A parameter cannot be pickled, so the fitted estimator cannot be saved."""


class PrecisionWarning(UserWarning):
    """An estimator fitted in bfloat16 computes in float32 on this device."""


class TrainingError(ValueError):
    """Training diverged: the loss became infinite or NaN."""


class _Shortened:
    """Shorten the message: names in it may be long on purpose."""

    def __str__(self) -> str:
        return shorten(super().__str__(), MOST_CHARACTERS)


class UnknownBackboneError(_Shortened, ValueError):
    """No backbone has this name."""


class UnknownLayerError(_Shortened, ValueError):
    """The backbone has no layer of this name."""


class WeightsError(_Shortened, ValueError):
    """A weights file is incompatible with the backbone or cannot be loaded safely."""


class WeightsNotFoundError(WeightsError):
    """The weights are not on this machine and could not be downloaded."""
