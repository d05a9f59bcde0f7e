"""The axes to draw on, without asking for matplotlib before something is drawn.

Labels are the user's text: written with ``parse_math=False``, a dollar is a dollar.
"""


def axes_library():
    """Import and return matplotlib's ``pyplot``; call it before work that it shows.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Displays are drawn with matplotlib: pip install 'skltl[plot]'."
        ) from error
    return plt


def axes_to_draw_on(ax=None, figsize=None):
    """Return the given axes, or those of a new figure."""
    if ax is None:
        _, ax = axes_library().subplots(figsize=figsize, layout="constrained")
    return ax
