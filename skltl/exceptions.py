"""Every error and warning class of skltl.

::

    Exception
    ├── ValueError
    │   ├── EngineError           the engine cannot run here
    │   ├── ImageReadError        an item of X cannot be read as an image
    │   ├── TrainingError         the loss is no longer a number
    │   ├── UnknownBackboneError  no backbone has this name
    │   ├── UnknownLayerError     the backbone has no such cut point
    │   └── WeightsError          a weights file does not fit or cannot be trusted
    │       └── WeightsNotFoundError   the weights are neither here nor downloadable
    └── TypeError
        └── ImageTypeError        an item of X is not an image at all
    UserWarning
    ├── CacheWarning              features cannot be stored, or not be read again
    ├── CheckpointWarning         the state of a fit cannot be saved
    ├── EngineWarning             another engine runs than the one that was fitted
    ├── ImageRangeWarning         floats lie outside [0, 1]
    └── PrecisionWarning          float32 stands in for bfloat16

They inherit from the built-in class that scikit-learn would raise, so that
``GridSearchCV(error_score=...)`` and existing ``except`` clauses treat them as usual.
"""

from __future__ import annotations

__all__ = [
    "CacheWarning",
    "CheckpointWarning",
    "EngineError",
    "EngineWarning",
    "ImageRangeWarning",
    "ImageReadError",
    "ImageTypeError",
    "PrecisionWarning",
    "TrainingError",
    "UnknownBackboneError",
    "UnknownLayerError",
    "WeightsError",
    "WeightsNotFoundError",
]


# Of a message, also of one with a hostile name in it.
MOST_CHARACTERS = 480


class CheckpointWarning(UserWarning):
    """The state of a fit cannot be saved; the fit goes on without."""


def shorten(text: str, n_characters: int = 80) -> str:
    """Leave out the middle of a long text, so that a message can be read."""
    if len(text) <= n_characters:
        return text
    n_first = (n_characters - 3) // 3
    return f"{text[:n_first]}...{text[n_first + 3 - n_characters :]}"


def quote(text: str, n_characters: int = 80) -> str:
    """Return a text as Python writes it, shortened before and after."""
    return shorten(repr(shorten(text, n_characters)), n_characters)


class EngineError(ValueError):
    """An engine cannot run a network here."""


class EngineWarning(UserWarning):
    """A network is run by another engine than where it was fitted.

    Features differ in the last digits.
    """


class ImageReadError(ValueError):
    """An item of ``X`` cannot be read as an image.

    Parameters
    ----------
    index : int
        Position of the item in ``X``.
    path : str or None
        The file's path, ``None`` for an item that is not a file.
    reason : str
        What is wrong with it.

    Attributes
    ----------
    index, path, reason
        As above. The error of the decoder, if any, is ``__cause__``.
    """

    def __init__(self, index: int, path: str | None, reason: str) -> None:
        # All three are kept in `args`: joblib pickles errors to bring them back
        # from its workers, and an error is rebuilt from its `args`.
        super().__init__(index, path, reason)
        self.index = index
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        # A hostile path or file shall not fill the screen; the attributes keep all.
        name = "" if self.path is None else f" ({quote(self.path, 120)})"
        reason = shorten(self.reason, 300)
        return f"Image {self.index}{name} could not be read: {reason}."


class ImageTypeError(TypeError):
    """An item of ``X`` is of a type that cannot hold an image.

    Parameters
    ----------
    index : int
        Position of the item in ``X``.
    reason : str
        What it is, and what was expected.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"Image {self.index} is {shorten(self.reason, 400)}."


class PrecisionWarning(UserWarning):
    """An estimator that was fitted in bfloat16 computes in float32 on this device."""


class TrainingError(ValueError):
    """Training went astray: the loss became infinite or NaN."""


class _InShort:
    """A hostile file or parameter shall not fill the screen; `args` keep all."""

    def __str__(self) -> str:
        return shorten(super().__str__(), MOST_CHARACTERS)


class UnknownBackboneError(_InShort, ValueError):
    """No backbone is registered under this name."""


class UnknownLayerError(_InShort, ValueError):
    """The backbone has no cut point of this name."""


class WeightsError(_InShort, ValueError):
    """A weights file does not fit the backbone, or cannot be loaded safely."""


class WeightsNotFoundError(WeightsError):
    """The weights are neither on this machine nor could they be downloaded."""


class CacheWarning(UserWarning):
    """The cache of features is damaged, full or not writable; results stay right."""


class ImageRangeWarning(UserWarning):
    """Images have another range than expected, so that features mean little.

    Floats outside [0, 1], or 16-bit values that do not reach an eighth of 65535. The
    message gives the range and what to do.
    """
