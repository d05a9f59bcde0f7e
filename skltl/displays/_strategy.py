"""``StrategyDisplay``: a data set among the strategies by size and similarity."""

from __future__ import annotations

import math

from sklearn.utils.validation import check_is_fitted

from skltl.displays._layout import import_pyplot, resolve_ax
from skltl.strategy import MIN_LEAD, relative_size, similarity_of, smallest_size

# Left and lower corner of each box, its strategies, and their description.
BOXES = {
    (0, 0): (("extract_early",), "linear model\non earlier features"),
    (1, 0): (("extract",), "linear model\non the last features"),
    (0, 1): (
        ("finetune_top", "scratch"),
        "fine-tune without the last layers\n(from scratch if very large)",
    ),
    (1, 1): (("finetune",), "fine-tune\nall layers"),
}

# Extent of a box: decades of size, and accuracy.
DECADES = 2.0
LEAD_SHOWN = 0.1


class StrategyDisplay:
    """Diagram of the strategies by data set size and domain similarity.

    A point shows where a data set is in it. Create the display with
    :meth:`from_advisor`.

    Parameters
    ----------
    n_images, n_classes : int
        Number of images and of classes, labels or values.
    lead : float
        Difference in accuracy, or R², between the best of the earlier layers and the
        last one.
    strategy : str
        Name of the strategy to highlight.
    n_smallest : int, default=None
        Number of images in the smallest class; ``None`` assumes balanced classes.
    targets : {"classes", "labels", "values"}, default="classes"
        Kind of the targets.

    Attributes
    ----------
    coordinates_ : tuple of two floats
        Place of the data set in the diagram.
    ax_ : matplotlib Axes
        Axes with the diagram.
    figure_ : matplotlib Figure
        Figure with the diagram.

    Examples
    --------
    >>> from skltl import StrategyDisplay
    >>> display = StrategyDisplay(300, 5, lead=0.0, strategy="extract")
    >>> [round(value, 2) for value in display.coordinates_]
    [1.1, 0.74]
    """

    __module__ = "skltl"

    def __init__(
        self,
        n_images,
        n_classes,
        lead,
        strategy,
        n_smallest=None,
        targets="classes",
    ):
        self.n_images = n_images
        self.n_classes = n_classes
        self.lead = lead
        self.strategy = strategy
        self.n_smallest = n_smallest
        self.targets = targets

    @classmethod
    def from_advisor(cls, advisor, *, ax=None):
        """Plot the data set of a fitted advisor.

        Parameters
        ----------
        advisor : StrategyAdvisor or TransferClassifier
            Fitted estimator.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.

        Returns
        -------
        StrategyDisplay
            The plotted display.
        """
        import_pyplot()
        check_is_fitted(advisor)
        advisor = getattr(advisor, "advisor_", advisor)
        if not (advisor is None or hasattr(advisor, "n_smallest_")):
            raise ValueError(
                "StrategyDisplay needs a StrategyAdvisor or a TransferClassifier; got "
                f"{type(advisor).__name__}."
            )
        if advisor is None:
            raise ValueError(
                "The TransferClassifier has no advisor: it was fitted with a given "
                "strategy instead of strategy='auto'."
            )
        return cls(
            advisor.n_images_,
            advisor.n_classes_,
            advisor.lead_[0],
            advisor.strategy_.name,
            advisor.n_smallest_,
            advisor.targets_,
        ).plot(ax=ax)

    @property
    def coordinates_(self):
        """Coordinates of the data set, from (0, 0), small and different, to (2, 2)."""
        n_smallest = smallest_size(
            self.n_images, self.n_classes, self.n_smallest, self.targets
        )
        size = relative_size(self.n_images, n_smallest)
        is_similar = similarity_of(self.lead) == "similar"
        right = 1 - (self.lead - MIN_LEAD) / LEAD_SHOWN
        up = 1 + math.log10(max(size, 1e-9)) / DECADES
        return _within(right, is_similar), _within(up, size >= 1)

    def plot(self, *, ax=None):
        """Plot the strategies and the data set.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.

        Returns
        -------
        StrategyDisplay
            The display itself.
        """
        ax = resolve_ax(ax, figsize=(6.4, 4.6))
        right, up = self.coordinates_
        for (left, low), (names, words) in BOXES.items():
            # Above the point if that is in the lower half of the box, or below it.
            has_low_point = (left, low) == (int(right), int(up)) and up % 1 < 0.5
            height = 0.75 if has_low_point else 0.25
            is_chosen = self.strategy in names
            ax.add_patch(
                import_pyplot().Rectangle(
                    (left + 0.02, low + 0.02),
                    0.96,
                    0.96,
                    facecolor="C0" if is_chosen else "whitesmoke",
                    edgecolor="lightgray",
                    alpha=0.25 if is_chosen else 1,
                )
            )
            ax.text(
                *(left + 0.5, low + height, words),
                ha="center",
                va="center",
                color="black" if is_chosen else "gray",
                weight="bold" if is_chosen else "normal",
            )
        self._draw_data(ax)
        ax.set(xlim=(0, 2), xlabel="similarity to the pretraining data")
        ax.set(ylim=(0, 2), ylabel="data set size")
        ax.set_xticks([0.5, 1.5], ["different", "similar"])
        ax.set_yticks([0.5, 1.5], ["small", "large"], rotation=90, va="center")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _draw_data(self, ax):
        right, up = self.coordinates_
        ax.plot(right, up, "o", color="C3", markersize=9, zorder=3)
        # Above the point, or below it near the upper border of the box.
        is_high = up % 1 > 0.85
        ax.annotate(
            f"{self.n_images:,} images"
            + (f", {self.n_classes} {self.targets}" if self.n_classes > 1 else ""),
            (int(right) + 0.5, up),
            xytext=(0, -9 if is_high else 9),
            va="top" if is_high else "bottom",
            textcoords="offset points",
            ha="center",
            color="C3",
        )
        if self.strategy == "as_is":
            ax.set_title("pretrained on these classes", fontsize="medium")


def _within(value, is_beyond):
    """Clip a coordinate to the inside of the box that the rules have chosen."""
    low, high = (1.03, 1.9) if is_beyond else (0.1, 0.97)
    return min(max(value, low), high)
