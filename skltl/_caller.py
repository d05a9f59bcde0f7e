"""Where in the user's code skltl was called, so that warnings point there."""

from __future__ import annotations

import inspect

PACKAGES = ("skltl.", "sklearn.", "joblib.")


def level_of_the_user() -> int:
    """Count the calls back to code that is not skltl's, scikit-learn's or joblib's.

    The number is the ``stacklevel`` of a warning that the calling function gives.
    """
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").startswith(PACKAGES):
        frame, level = frame.f_back, level + 1
    return level
