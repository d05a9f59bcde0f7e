"""``TransferGainDisplay``: transfer learning compared with training from scratch."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import learning_curve

from skltl.displays._layout import import_pyplot, resolve_ax
from skltl.displays._training_history import trained_in

# The slope of a curve is taken up to this fraction of its rise to the final score.
RISE_FRACTION = 0.9


class TransferGainDisplay:
    """Learning curves with transfer and from scratch, and the gains of transfer.

    Transfer may give a higher start, a higher slope and a higher asymptote [1]_. Create
    the display with :meth:`from_estimators`.

    Parameters
    ----------
    steps : tuple of two arrays
        Epochs, or numbers of training images, with transfer and from scratch.
    scores : tuple of two arrays
        Scores at the steps.
    step_name : str, default="epoch"
        Label of the steps.
    asymptotes : tuple of two floats, default=None
        Final scores; ``None`` is the last ones. They differ where the weights of an
        epoch before the last are kept.

    Attributes
    ----------
    gains_ : dict of str to float
        Gains in start, slope (per step) and asymptote.
    ax_ : matplotlib Axes
        Axes with the curves.
    figure_ : matplotlib Figure
        Figure with the curves.

    References
    ----------
    .. [1] Torrey, Shavlik, "Transfer learning", Handbook of research on machine
       learning applications, 2009.

    Examples
    --------
    >>> from skltl import TransferGainDisplay
    >>> display = TransferGainDisplay(
    ...     ([1, 2, 3], [1, 2, 3]), ([0.6, 0.9, 0.9], [0.1, 0.3, 0.5])
    ... )
    >>> {name: round(gain, 2) for name, gain in display.gains_.items()}
    {'start': 0.5, 'slope': 0.1, 'asymptote': 0.4}
    """

    __module__ = "skltl"

    def __init__(self, steps, scores, step_name="epoch", asymptotes=None):
        self.steps = tuple(np.asarray(values, dtype=float) for values in steps)
        self.scores = tuple(np.asarray(values, dtype=float) for values in scores)
        self.step_name = step_name
        self.asymptotes = asymptotes

    @classmethod
    def from_estimators(
        cls,
        with_transfer,
        from_scratch,
        X=None,
        y=None,
        *,
        sizes=None,
        cv=3,
        random_state=0,
        ax=None,
    ):
        """Plot the learning curves of two classifiers or regressors.

        Parameters
        ----------
        with_transfer, from_scratch : FineTunedCNNClassifier or FineTunedCNNRegressor
            Fitted estimators, for scores by epoch: those on the validation set if both
            have one, otherwise those of training. They may be in a pipeline, a search
            or a `TransferClassifier`. With `X`, any estimators; they are fitted for
            scores by number of training images.
        X : sequence of n images, or array of shape (n, d), default=None
            Training data.
        y : array of shape (n,), default=None
            Targets.
        sizes : sequence of float or int, default=None
            Fractions or numbers of training images; ``None`` is a fifth to all of them
            in five steps.
        cv : int or splitter, default=3
            Cross-validation folds, as in scikit-learn.
        random_state : int, default=0
            Controls the sampling of training images, the same for both.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.

        Returns
        -------
        TransferGainDisplay
            The plotted display.
        """
        import_pyplot()
        both = (with_transfer, from_scratch)
        if X is None:
            steps, scores, asymptotes = _by_epoch(both)
            return cls(steps, scores, asymptotes=asymptotes).plot(ax=ax)
        sizes = np.linspace(0.2, 1, 5) if sizes is None else sizes
        curves = [
            learning_curve(
                *(estimator, X, y),
                train_sizes=sizes,
                cv=cv,
                shuffle=True,
                random_state=random_state,
                error_score="raise",
            )
            for estimator in both
        ]
        steps = [curve[0] for curve in curves]
        scores = [curve[2].mean(axis=1) for curve in curves]
        return cls(steps, scores, "number of training images").plot(ax=ax)

    @property
    def gains_(self):
        """Gains in start, slope (per step) and asymptote."""
        ends = self.asymptotes
        if ends is None:
            ends = [scores[-1] for scores in self.scores]
        transfer, scratch = (
            _start_slope_asymptote(*curve)
            for curve in zip(self.steps, self.scores, ends, strict=True)
        )
        names = ("start", "slope", "asymptote")
        return {
            name: float(a - b)
            for name, a, b in zip(names, transfer, scratch, strict=True)
        }

    def plot(self, *, ax=None):
        """Plot both curves, with the gains in the title.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.

        Returns
        -------
        TransferGainDisplay
            The display itself.
        """
        ax = resolve_ax(ax, figsize=(6.4, 4.2))
        names = ("with transfer", "from scratch")
        for number, name in enumerate(names):
            ax.plot(
                *(self.steps[number], self.scores[number]),
                marker="o" if len(self.steps[number]) <= 20 else None,
                markersize=4,
                color=f"C{number}",
                label=name,
            )
        words = ", ".join(f"{name} {gain:+.3g}" for name, gain in self.gains_.items())
        ax.set_title(f"gains: {words}", fontsize="medium")
        ax.legend(frameon=False)
        lowest = min(0.0, *(scores.min() for scores in self.scores))  # R² may be < 0
        ax.set(xlabel=self.step_name, ylabel="score", ylim=(1.02 * lowest, 1.02))
        ax.grid(axis="y", alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _by_epoch(estimators):
    """Return the epochs, the scores by epoch and those of the final weights."""
    classifiers = [trained_in(estimator) for estimator in estimators]
    histories = [classifier.history_ for classifier in classifiers]
    if not all(histories):
        raise ValueError("The training history of an estimator is empty.")
    has_both = all("validation_score" in history[-1] for history in histories)
    key = "validation_score" if has_both else "score"
    scores = [[epoch[key] for epoch in history] for history in histories]
    ends = [curve[-1] for curve in scores]
    for number, classifier in enumerate(classifiers):
        if has_both and classifier.best_validation_score_ is not None:
            ends[number] = classifier.best_validation_score_
    return [np.arange(1, len(curve) + 1) for curve in scores], scores, ends


def _start_slope_asymptote(steps, scores, asymptote):
    """Return the first score, the slope of most of the rise, and the final score."""
    start = scores[0]
    last = len(scores) - 1
    has_risen = scores >= start + RISE_FRACTION * (asymptote - start)
    until = min(max(has_risen.argmax(), 1), last) if has_risen.any() else last
    if until == 0:
        return start, 0.0, asymptote
    slope = (scores[until] - start) / (steps[until] - steps[0])
    return start, slope, asymptote
