"""Where in the user's code skltl was called, so that warnings point there."""

from __future__ import annotations

import inspect


def level_of_the_user() -> int:
    """Count the calls back to code that is neither skltl's nor scikit-learn's.

    The number is the ``stacklevel`` of a warning that the calling function gives.
    """
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals["__name__"].startswith(("skltl.", "sklearn.")):
        frame, level = frame.f_back, level + 1
    return level
