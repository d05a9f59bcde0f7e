"""``TrainingHistoryDisplay``: loss and score by epoch, in both stages."""

from __future__ import annotations

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skltl._nested import unwrapped
from skltl.displays._layout import import_pyplot, line_style, resolve_axes
from skltl.finetuning import FineTunedCNN

# Keys of the history in each panel, with their labels.
PANELS = {
    "loss": {"loss": "training", "validation_loss": "validation"},
    "score": {"score": "training", "validation_score": "validation"},
    "learning rate": {"head_lr": "head", "backbone_lr": "backbone"},
}

# Longer histories are lines without markers. A single epoch needs one to be visible.
MAX_MARKERS = 20


class TrainingHistoryDisplay:
    """Loss and score of a fine-tuned network by epoch.

    Create one with :meth:`from_estimator`.

    Parameters
    ----------
    history : list of dict
        One dictionary for each epoch, as in the attribute `history_` of
        `FineTunedCNNClassifier`.

    Attributes
    ----------
    stages_ : list of (str, int)
        Name and number of epochs of each stage.
    lines_ : dict of str to matplotlib Line2D
        Line of each key of the history.
    axes_ : array of matplotlib Axes
        Axes of the losses, the scores and, if requested, the learning rates.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    FineTunedCNNClassifier : Classifier with such a history.

    Examples
    --------
    >>> from skltl import TrainingHistoryDisplay
    >>> history = [
    ...     {"stage": "head", "epoch": 1, "loss": 0.9, "score": 0.6},
    ...     {"stage": "head", "epoch": 2, "loss": 0.5, "score": 0.8},
    ... ]
    >>> TrainingHistoryDisplay(history).stages_
    [('head', 2)]
    """

    __module__ = "skltl"

    def __init__(self, history):
        self.history = list(history)
        if not self.history:
            raise ValueError("The history is empty: there was no epoch.")

    @classmethod
    def from_estimator(cls, estimator, *, learning_rates=False, axes=None, **kwargs):
        """Plot the history of a fitted classifier or regressor.

        Parameters
        ----------
        estimator : FineTunedCNNClassifier or FineTunedCNNRegressor
            Fitted estimator; or a fitted pipeline, search or `TransferClassifier`
            that contains one.
        learning_rates : bool, default=False
            Whether to plot the learning rates as well.
        axes : array of 2 matplotlib Axes, or 3 with `learning_rates`, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``plot`` for all lines.

        Returns
        -------
        TrainingHistoryDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator has no training history, or `axes` has another length.
        """
        import_pyplot()
        display = cls(trained_in(estimator).history_)
        return display.plot(learning_rates=learning_rates, axes=axes, **kwargs)

    @property
    def stages_(self):
        """Name and number of epochs of each stage."""
        names = [epoch["stage"] for epoch in self.history]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]

    def plot(self, *, learning_rates=False, axes=None, **kwargs):
        """Plot the history.

        Parameters
        ----------
        learning_rates : bool, default=False
            Whether to plot the learning rates as well.
        axes : array of 2 matplotlib Axes, or 3 with `learning_rates`, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``plot`` for all lines.

        Returns
        -------
        TrainingHistoryDisplay
            The display itself.
        """
        titles = list(PANELS) if learning_rates else ["loss", "score"]
        axes = resolve_axes(axes, len(titles), len(titles), panel_size=(4.6, 3.8))
        self.lines_ = {}
        for ax, title in zip(axes, titles, strict=True):
            self._plot_lines(ax, PANELS[title], kwargs)
            self._shade_stages(ax)
            ax.set_title(title, fontsize="medium", pad=18)
            ax.set_xlabel("epoch")
            ax.grid(axis="y", alpha=0.3)
        axes[0].set_ylim(bottom=0)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self

    def _plot_lines(self, ax, labels, kwargs):
        epochs = np.arange(1, len(self.history) + 1)
        marker = "o" if len(epochs) <= MAX_MARKERS else None
        linestyles, colors = ("-", "--"), ("C0", "C1")
        for (key, label), linestyle, color in zip(
            labels.items(), linestyles, colors, strict=True
        ):
            values = [epoch.get(key, np.nan) for epoch in self.history]
            if np.isfinite(values).any():
                style = {"linestyle": linestyle, "color": color, "label": label}
                style |= {"marker": marker, "markersize": 4}
                style = line_style(style, kwargs)
                (self.lines_[key],) = ax.plot(epochs, values, **style)
        if len(ax.get_lines()) > 1:
            ax.legend(frameon=False)

    def _shade_stages(self, ax):
        """Shade every second stage, and write the name of each above the axes."""
        start = 0.5
        for number, (name, n_epochs) in enumerate(self.stages_):
            end = start + n_epochs
            if number % 2:
                ax.axvspan(start, end, color="black", alpha=0.06, linewidth=0)
            ax.text(
                (start + end) / 2,
                1.01,  # above the axes, where it never overlaps the legend
                name,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize="small",
                color="dimgray",
            )
            start = end
        ax.set_xlim(0.5, start)
        ax.xaxis.get_major_locator().set_params(integer=True)


def trained_in(estimator):
    """Return the fine-tuned classifier or regressor inside of a fitted estimator."""
    check_is_fitted(estimator)
    tuned = unwrapped(estimator)
    if isinstance(tuned, Pipeline):
        tuned = unwrapped(tuned[-1])
    if not isinstance(tuned, FineTunedCNN):
        raise ValueError(
            "Only FineTunedCNNClassifier and FineTunedCNNRegressor have a training "
            "history; got "
            f"{type(tuned).__name__}."
        )
    check_is_fitted(tuned, "history_")
    return tuned
