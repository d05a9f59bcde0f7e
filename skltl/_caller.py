"""Find the user's code on the call stack, so that warnings point to it."""

from __future__ import annotations

import inspect

PACKAGES = ("skltl.", "sklearn.", "joblib.", "torch.", "contextlib")


def user_stacklevel() -> int:
    """Return the ``stacklevel`` of a warning that the calling function gives.

    It points to the first caller outside of skltl and the packages that may call it.
    """
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").startswith(PACKAGES):
        frame, level = frame.f_back, level + 1
    return level
