"""``GradCAMDisplay``: where in a picture a class was seen."""

from __future__ import annotations

from skltl.classifiers import class_activation
from skltl.displays._axes import axes_library
from skltl.displays._pictures import as_title, draw_picture, grid_of_axes


class GradCAMDisplay:
    """Pictures under maps of where a class was seen.

    Make one with :meth:`from_estimator`.

    Parameters
    ----------
    pictures : array of shape (n, h, w, 3)
        As the network sees them: uint8, or float32 in [0, 1].
    maps : array of shape (n, h, w)
        From 0 to 1.
    labels : array of shape (n,)
        Which class was looked for in each.

    Attributes
    ----------
    axes_ : array of matplotlib Axes
        After a plot.
    figure_ : matplotlib Figure
        Likewise.

    Notes
    -----
    The map is as coarse as the feature map at the cut, 7 x 7 at the end of most
    networks, and drawn smoothly over the picture [1]_.

    References
    ----------
    .. [1] Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
       gradient-based localization", ICCV, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import GradCAMDisplay
    >>> pictures = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    >>> GradCAMDisplay(pictures, np.ones((1, 8, 8)), ["cat"]).labels
    ['cat']
    """

    def __init__(self, pictures, maps, labels):
        self.pictures = pictures
        self.maps = maps
        self.labels = labels

    @classmethod
    def from_estimator(cls, estimator, X, labels=None, *, n_columns=6):
        """Compute the maps, and draw them.

        Parameters
        ----------
        estimator : classifier
            Fitted: one of skltl's, or a pipeline of a `CNNFeatureTransformer`, a
            ``StandardScaler`` or none, and a linear classifier; or a search over one.
        X : sequence of n pictures, or array of shape (n, d)
            Of any kind that it takes.
        labels : array of shape (n,) or a label, default=None
            Which class to look for in each picture; ``None`` is the one that is
            predicted. One label stands for all pictures.
        n_columns : int, default=6
            How many side by side.

        Returns
        -------
        GradCAMDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator is of another kind, or it is cut where there is no map.
        """
        axes_library()
        found = class_activation(estimator, X, labels)
        display = cls(found.pictures, found.maps, found.labels)
        return display.plot(n_columns=n_columns)

    def plot(self, *, n_columns=6, alpha=0.5, cmap="inferno"):
        """Draw the pictures under their maps.

        Parameters
        ----------
        n_columns : int, default=6
            How many side by side.
        alpha : float, default=0.5
            How much of a map covers the picture, from 0 to 1.
        cmap : str, default="inferno"
            Matplotlib's colours of a map.

        Returns
        -------
        GradCAMDisplay
            The display itself.
        """
        axes = grid_of_axes(len(self.pictures), n_columns, height=2.1)
        for ax, picture, seen, label in zip(
            axes, self.pictures, self.maps, self.labels, strict=True
        ):
            draw_picture(ax, picture)
            ax.imshow(seen, cmap=cmap, alpha=alpha, vmin=0, vmax=1)
            title = as_title(label)
            ax.set_title(title, fontsize="small", color="dimgray", parse_math=False)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self
