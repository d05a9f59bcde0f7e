"""``TrainingHistoryDisplay``: loss and score by epoch, in both stages."""

from __future__ import annotations

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skltl.displays._layout import axes_library
from skltl.finetuning import FineTunedCNNClassifier, unwrapped

# What is drawn in each part: keys of the records, names, and styles of lines.
LOSSES = {"loss": ("training", "-"), "validation_loss": ("held out", "--")}
SCORES = {"score": ("training", "-"), "validation_score": ("held out", "--")}
# Up to so many epochs, each has a marker: a line of a single one would not be seen.
MOST_MARKED = 20

RATES = {"head_lr": ("new layers", "-"), "backbone_lr": ("pretrained layers", "--")}


class TrainingHistoryDisplay:
    """Loss and score of a fine-tuned network by epoch.

    Make one with :meth:`from_estimator`.

    Parameters
    ----------
    history : list of dict
        One record for each epoch, as `FineTunedCNNClassifier` keeps them in `history_`.

    Attributes
    ----------
    axes_ : array of matplotlib Axes
        One for the losses, one for the scores, one for the rates if asked for; after a
        plot.
    figure_ : matplotlib Figure
        Likewise.

    See Also
    --------
    FineTunedCNNClassifier : What has such a history.

    Examples
    --------
    >>> from skltl import TrainingHistoryDisplay
    >>> records = [
    ...     {"stage": "head", "epoch": 1, "loss": 0.9, "score": 0.6},
    ...     {"stage": "head", "epoch": 2, "loss": 0.5, "score": 0.8},
    ... ]
    >>> TrainingHistoryDisplay(records).stages
    [('head', 2)]
    """

    def __init__(self, history):
        self.history = list(history)
        if not self.history:
            raise ValueError("The history is empty: there was no epoch.")

    @classmethod
    def from_estimator(cls, estimator, *, rates=False, axes=None):
        """Draw the history of a fitted classifier.

        Parameters
        ----------
        estimator : FineTunedCNNClassifier
            Fitted; or a pipeline, search or `TransferClassifier` that holds one.
        rates : bool, default=False
            Whether the learning rates are drawn, too.
        axes : sequence of matplotlib Axes, default=None
            Where to draw, two, or three with `rates`; ``None`` makes a figure.

        Returns
        -------
        TrainingHistoryDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator has no history: it does not train a network.
        """
        axes_library()
        return cls(trained_in(estimator).history_).plot(rates=rates, axes=axes)

    @property
    def stages(self):
        """The stages in their order, and how many epochs each has."""
        names = [record["stage"] for record in self.history]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]

    def plot(self, *, rates=False, axes=None):
        """Draw the history.

        Parameters
        ----------
        rates : bool, default=False
            Whether the learning rates are drawn, too.
        axes : sequence of matplotlib Axes, default=None
            Where to draw, two, or three with `rates`; ``None`` makes a figure.

        Returns
        -------
        TrainingHistoryDisplay
            The display itself.
        """
        parts = {"loss": LOSSES, "score": SCORES}
        if rates:
            parts["learning rate"] = RATES
        if axes is None:
            _, axes = axes_library().subplots(
                1, len(parts), figsize=(4.6 * len(parts), 3.8), layout="constrained"
            )
        axes = np.ravel(axes)
        if len(axes) != len(parts):
            raise ValueError(f"There are {len(axes)} axes for {len(parts)} parts.")
        for ax, (title, lines) in zip(axes, parts.items(), strict=True):
            self._draw_lines(ax, lines)
            self._shade_stages(ax)
            ax.set_title(title, fontsize="medium", pad=18)
            ax.set_xlabel("epoch")
            ax.grid(axis="y", alpha=0.3)
        axes[0].set_ylim(bottom=0)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self

    def _draw_lines(self, ax, lines):
        epochs = np.arange(1, len(self.history) + 1)
        marker = "o" if len(epochs) <= MOST_MARKED else None
        for number, (key, (name, style)) in enumerate(lines.items()):
            values = [record.get(key, np.nan) for record in self.history]
            if np.isfinite(values).any():
                ax.plot(
                    *(epochs, values, style),
                    marker=marker,
                    markersize=4,
                    color=f"C{number}",
                    label=name,
                )
        if len(ax.get_lines()) > 1:
            ax.legend(frameon=False)

    def _shade_stages(self, ax):
        """Shade every second stage, and write the names of all above."""
        first = 0.5
        for number, (name, n_epochs) in enumerate(self.stages):
            last = first + n_epochs
            if number % 2:
                ax.axvspan(first, last, color="black", alpha=0.06, linewidth=0)
            ax.text(
                (first + last) / 2,
                1.01,  # above the axes, where no legend is
                name,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize="small",
                color="dimgray",
            )
            first = last
        ax.set_xlim(0.5, first)
        ax.xaxis.get_major_locator().set_params(integer=True)


def trained_in(estimator):
    """Return the fine-tuned classifier in a fitted estimator."""
    check_is_fitted(estimator)
    trained = unwrapped(estimator)
    if isinstance(trained, Pipeline):
        trained = unwrapped(trained[-1])
    if not isinstance(trained, FineTunedCNNClassifier):
        raise ValueError(
            "Only FineTunedCNNClassifier records a training history; got "
            f"{type(trained).__name__}."
        )
    check_is_fitted(trained, "history_")
    return trained
