"""``LayerScoresDisplay``: the score by depth of the cut."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import numpy as np
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.model_selection import GridSearchCV
from sklearn.utils.validation import check_is_fitted

from skltl.backbones import (
    block_shapes,
    get_backbone,
    reached_main_blocks,
    resolve_layer,
    skeleton,
)
from skltl.displays._axes import axes_to_draw_on
from skltl.features import can_pool

# More lines than colours of matplotlib's usual cycle, or long ones, are named beside
# the axes and not in them.
MOST_LINES_INSIDE = 6


class LayerScoresDisplay:
    """Score against depth of the cut, with a line for each other setting.

    Make one with :meth:`from_search` or :meth:`from_estimator`.

    Parameters
    ----------
    layers : list of str
        The cut points, from the picture to the logits.
    scores : dict of str to array of shape (n_layers,)
        For each line its name and its mean scores; NaN where there is none.
    deviations : dict of str to array of shape (n_layers,)
        Their standard deviations over the folds.
    score_name : str, default="score"
        What the scores are.

    Attributes
    ----------
    ax_, figure_
        matplotlib's axes and figure, after a plot.
    best_ : tuple of (str, str, float)
        Cut point, line and score of the best.

    See Also
    --------
    CNNFeatureTransformer : Its `cache` makes searches over cut points cheap.

    Examples
    --------
    >>> from skltl import LayerScoresDisplay
    >>> display = LayerScoresDisplay(
    ...     layers=["block1", "block2"],
    ...     scores={"C=0.1": [0.5, 0.75], "C=1": [0.6, 0.7]},
    ...     deviations={"C=0.1": [0.1, 0.1], "C=1": [0.1, 0.1]},
    ... )
    >>> display.best_
    ('block2', 'C=0.1', 0.75)
    """

    def __init__(self, *, layers, scores, deviations, score_name="score"):
        self.layers = list(layers)
        self.scores = {name: np.asarray(line, float) for name, line in scores.items()}
        self.deviations = {
            name: np.asarray(line, float) for name, line in deviations.items()
        }
        self.score_name = score_name

    @classmethod
    def from_search(cls, search, *, metric=None, ax=None):
        """Draw the scores of a search that has been fitted.

        Parameters
        ----------
        search : GridSearchCV or another search with ``cv_results_``
            Over the `layer` of a transformer, and any other parameters.
        metric : str, default=None
            Which of the scores, if the search has several.
        ax : matplotlib Axes, default=None
            Where to draw; ``None`` makes a figure.

        Returns
        -------
        LayerScoresDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the search did not vary `layer`, or has no such metric.
        """
        check_is_fitted(search, "cv_results_")
        results = search.cv_results_
        metric = _metric(results, metric)
        candidates = results["params"]
        prefix = _prefix_of_layer(candidates[0], search.estimator.get_params())
        places, lines = [], []
        for candidate in candidates:
            backbone = {**search.estimator.get_params(), **candidate}[
                f"{prefix}backbone"
            ]
            places.append(_place(backbone, candidate[f"{prefix}layer"]))
            rest = {k: v for k, v in candidate.items() if k != f"{prefix}layer"}
            lines.append(_line_name(rest))
        layers = [name for _, name in sorted(set(places))]
        layers = list(dict.fromkeys(layers))
        tables = []
        for statistic in ("mean", "std"):
            table = {line: np.full(len(layers), np.nan) for line in lines}
            values = results[f"{statistic}_test_{metric}"]
            for (_, layer), line, value in zip(places, lines, values, strict=True):
                table[line][layers.index(layer)] = value
            tables.append(table)
        display = cls(
            layers=layers,
            scores=tables[0],
            deviations=tables[1],
            score_name=_score_name(search, metric),
        )
        return display.plot(ax=ax)

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y,
        *,
        layers="all",
        cv=5,
        scoring=None,
        n_jobs=None,
        ax=None,
    ):
        """Cross-validate an estimator at several cut points, and draw the scores.

        Each picture crosses the network once: where the estimator has no `cache`, it
        gets one for the time of this call.

        Parameters
        ----------
        estimator : Pipeline or other estimator
            With a `CNNFeatureTransformer` in it. It is cloned, not changed.
        X : sequence of n pictures
            Of any kind that the estimator takes.
        y : array of shape (n,)
            What they show.
        layers : "all" or list, default="all"
            The cut points. ``"all"`` is all main ones that pictures of this size get
            to.
        cv : int or splitter, default=5
            As in scikit-learn's ``cross_validate``.
        scoring : str or callable, default=None
            Likewise.
        n_jobs : int, default=None
            Likewise.
        ax : matplotlib Axes, default=None
            Where to draw; ``None`` makes a figure.

        Returns
        -------
        LayerScoresDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there is no transformer with a `layer` in the estimator.
        """
        estimator = clone(estimator)
        params = estimator.get_params()
        prefix = _prefix_of_layer(params, params)
        if isinstance(layers, str):
            step = params[prefix.removesuffix("__")] if prefix else estimator
            layers = _main_layers(step, X)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if not params[f"{prefix}cache"]:
                estimator.set_params(**{f"{prefix}cache": folder})
            search = GridSearchCV(
                estimator,
                {f"{prefix}layer": list(layers)},
                cv=cv,
                scoring=scoring,
                n_jobs=n_jobs,
                refit=False,
            ).fit(X, y)
        return cls.from_search(search, ax=ax)

    @property
    def best_(self):
        """Cut point, line and score of the best."""
        best = max(self.scores, key=lambda line: np.nanmax(self.scores[line]))
        index = int(np.nanargmax(self.scores[best]))
        return self.layers[index], best, float(self.scores[best][index])

    def plot(self, ax=None):
        """Draw the scores.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; ``None`` makes a figure.

        Returns
        -------
        LayerScoresDisplay
            The display itself.
        """
        width = max(6.4, 0.7 * len(self.layers) + 2)
        ax = axes_to_draw_on(ax, figsize=(width, 4.8))
        positions = np.arange(len(self.layers))
        colours = _colours(len(self.scores))
        for (line, scores), colour in zip(self.scores.items(), colours, strict=True):
            there = ~np.isnan(scores)
            at, mean = positions[there], scores[there]
            spread = self.deviations[line][there]
            ax.plot(at, mean, "o-", color=colour, label=line or None, markersize=4)
            if len(self.scores) <= MOST_LINES_INSIDE:
                low, high = mean - spread, mean + spread
                ax.fill_between(at, low, high, color=colour, alpha=0.1, linewidth=0)
        self._mark_best(ax)
        long = max(map(len, self.layers)) * len(self.layers) > 60
        ax.set_xticks(
            positions,
            self.layers,
            rotation=40 if long else 0,
            ha="right" if long else "center",
            rotation_mode="anchor" if long else "default",
        )
        ax.set_xlabel("cut after")
        ax.set_ylabel(self.score_name)
        ax.grid(axis="y", alpha=0.3)
        _draw_legend(ax, len(self.scores))
        self.ax_ = ax
        self.figure_ = ax.figure
        return self

    def _mark_best(self, ax):
        layer, line, score = self.best_
        label = f"best: {layer}{', ' + line if line else ''} ({score:.3f})"
        ax.plot(
            self.layers.index(layer),
            score,
            "*",
            color="black",
            markersize=13,
            zorder=5,
            label=label,
        )


def _metric(results, metric):
    """Return which scores of a search are meant: the end of their columns' names."""
    prefix = "mean_test_"
    known = [name.removeprefix(prefix) for name in results if name.startswith(prefix)]
    if metric is None and len(known) == 1:
        return known[0]
    if metric not in known:
        raise ValueError(f"metric={metric!r}, but the search has {', '.join(known)}.")
    return metric


def _score_name(search, metric):
    """Name the scores: by the metric, or by what `score` of the estimator is."""
    if metric != "score":
        return metric
    if isinstance(search.scoring, str):
        return search.scoring
    if search.scoring is not None:
        return "score"
    if is_classifier(search.estimator):
        return "accuracy"
    return "R²" if is_regressor(search.estimator) else "score"


def _prefix_of_layer(varied, params):
    """Return what stands before ``layer`` in a nested parameter's name."""
    for name in varied:
        prefix = name.removesuffix("layer")
        if name.endswith("layer") and f"{prefix}backbone" in params:
            return prefix
    raise ValueError(
        "There is no parameter 'layer' of a CNNFeatureTransformer among "
        f"{', '.join(sorted(varied))}."
    )


def _main_layers(transformer, X):
    """Return the main cut points that pictures of the transformer's size get to."""
    fitted = clone(transformer).set_params(layer=0, pooling="avg").fit(X)
    backbone, size = fitted.backbone_, fitted.preprocessing_.crop_size
    reached = reached_main_blocks(backbone, size)
    shapes = block_shapes(backbone, size, reached)
    return [
        name
        for name, block in skeleton(backbone).cut_points.items()
        if block in reached and can_pool(shapes[block], transformer.pooling)
    ]


def _place(backbone, layer):
    """Return how deep a `layer` parameter cuts, and its name."""
    record = get_backbone(backbone)
    several = layer if isinstance(layer, (list, tuple)) else [layer]
    cut_points = [resolve_layer(record, one) for one in several]
    blocks = list(skeleton(record).blocks)
    depths = [blocks.index(cut_point.block) for cut_point in cut_points]
    name = " + ".join(cut_point.name for cut_point in cut_points)
    return (max(depths) / len(blocks), len(depths)), name


def _line_name(params):
    """Name a line by the parameters that tell it from the others."""
    return ", ".join(
        f"{name.rpartition('__')[2]}={_text(value)}" for name, value in params.items()
    )


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _colours(n):
    from matplotlib import colormaps

    if n <= 1:
        return ["C0"] * n
    return [colormaps["viridis"](share) for share in np.linspace(0, 0.85, n)]


def _draw_legend(ax, n_lines):
    if n_lines <= MOST_LINES_INSIDE:
        ax.legend(frameon=False)
    else:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
