"""The axes to draw on, without asking for matplotlib before something is drawn."""


def axes_to_draw_on(ax=None, figsize=None):
    """Return the given axes, or those of a new figure.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Displays are drawn with matplotlib: pip install 'skltl[plot]'."
        ) from error
    _, ax = plt.subplots(figsize=figsize, layout="constrained")
    return ax
