"""``LayerScoresDisplay``: the score of a search by layer."""

from __future__ import annotations

from numbers import Integral, Real
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from skltl.displays._layout import axes_library, axes_to_draw_on
from skltl.exceptions import shorten
from skltl.inference import can_pool
from skltl.networks import (
    Backbone,
    block_shapes,
    get_backbone,
    reached_main_blocks,
    resolve_layer,
    skeleton,
)


def last_round(results):
    """Of a search in rounds with ever more images, return the results of the last.

    Returns
    -------
    results : dict of str to list
        The columns.
    rows : list of int
        Where they stand in what was given.
    """
    n = len(results["params"])
    if "iter" not in results:
        return results, list(range(n))
    last = max(results["iter"])
    rows = [row for row in range(n) if results["iter"][row] == last]
    kept = {name: [column[row] for row in rows] for name, column in results.items()}
    return kept, rows


def metric_of(search, results, metric):
    """Return which scores of a search are meant: the end of their columns' names."""
    prefix = "mean_test_"
    known = [name.removeprefix(prefix) for name in results if name.startswith(prefix)]
    if metric is None and len(known) == 1:
        return known[0]
    if metric is None and isinstance(search.refit, str):
        return search.refit
    if metric not in known:
        raise ValueError(f"metric={metric!r}, but the search has {', '.join(known)}.")
    return metric


def chosen_row(search, metric, rows):
    """Return the row of the candidate that a search has chosen by a metric, or None."""
    is_single = not getattr(search, "multimetric_", False)  # then it is "score"
    is_by_metric = is_single or search.refit == metric
    index = getattr(search, "best_index_", None)
    return rows.index(index) if is_by_metric and index in rows else None


def score_name_of(search, metric):
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


def prefix_of_layer(varied, params):
    """Return what stands before ``layer`` in a nested parameter's name."""
    for name in varied:
        prefix = name.removesuffix("layer")
        if name.endswith("layer") and f"{prefix}backbone" in params:
            return prefix
    raise ValueError(
        "There is no parameter 'layer' of a CNNFeatureTransformer among "
        f"{', '.join(sorted(varied)) or 'those that vary'}."
    )


def arrange(candidates, scores, estimator):
    """Find the place of each candidate along the network, and the name of its line.

    Returns
    -------
    places : dict of int to (sortable, str)
        Depth and name of the cut, of each candidate that has a score.
    lines : list of str
        For each candidate.
    """
    varied = list(dict.fromkeys(name for one in candidates for name in one))
    prefix = prefix_of_layer(varied, estimator.get_params())
    layer_name, backbone_name = f"{prefix}layer", f"{prefix}backbone"
    complete = [_parameters(estimator, candidate) for candidate in candidates]
    backbones = [one[backbone_name] for one in complete]
    names = _distinct([str(one) for one in backbones], list(map(_identity, backbones)))
    order = list(dict.fromkeys(names))
    places = {}
    for index, params in enumerate(complete):
        if np.isfinite(scores[index]):
            depth, name = place_of(params[backbone_name], params[layer_name])
            name = f"{names[index]} {name}" if len(order) > 1 else name
            places[index] = (order.index(names[index]), *depth), name
    rest = [
        {name: value for name, value in one.items() if name != layer_name}
        for one in candidates
    ]
    return places, _line_names(rest)


def place_of(backbone, layer):
    """Return how deep a `layer` parameter cuts, and its name."""
    record = get_backbone(backbone)
    several = layer if isinstance(layer, (list, tuple)) else [layer]
    cut_points = [resolve_layer(record, one) for one in several]
    blocks = list(skeleton(record).blocks)
    depths = [blocks.index(cut_point.block) for cut_point in cut_points]
    name = " + ".join(cut_point.name for cut_point in cut_points)
    return (max(depths), len(depths)), name


def _parameters(estimator, candidate):
    """Return all parameters of a candidate, whose steps may be others."""
    candidate = clone(candidate, safe=False)  # as searches do
    return clone(estimator).set_params(**candidate).get_params()


def _line_names(rests):
    """Name lines by the parameters that tell them apart, as shortly as suffices."""
    if not any(rests):
        return [""] * len(rests)
    keys = [_identity(rest) for rest in rests]
    for name_of, text_of in (
        (_last, _rounded),
        (_full, _rounded),
        (_last, str),
        (_full, str),
        (_full, repr),
    ):
        names = [_joined(rest, name_of, text_of) or "as given" for rest in rests]
        if len(set(names)) == len(set(keys)):
            return names
    return _distinct(names, keys)


def _distinct(names, keys):
    """Return names; those that stand for different things get a number."""
    known: dict = {}
    for name, key in zip(names, keys, strict=True):
        known.setdefault(name, {})[key] = None
    return [
        f"{name} ({list(known[name]).index(key) + 1})" if len(known[name]) > 1 else name
        for name, key in zip(names, keys, strict=True)
    ]


def _identity(value):
    """Return what is equal for equal parameters, and can be a key."""
    if isinstance(value, Backbone):  # its text is a name that another may have
        return value
    if hasattr(value, "get_params") and not isinstance(value, type):
        return type(value), _identity(value.get_params(deep=False))
    if isinstance(value, dict):
        return tuple((name, _identity(one)) for name, one in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_identity(one) for one in value)
    return str(value)


def _joined(params, name_of, text_of):
    return ", ".join(
        f"{name_of(name)}={_text(value, text_of)}" for name, value in params.items()
    )


def _full(name):
    return name


def _last(name):
    return name.rpartition("__")[2]


def _rounded(value):
    """Write a number with three significant digits."""
    is_float = isinstance(value, Real) and not isinstance(value, Integral)
    return f"{value:.3g}" if is_float else str(value)


def _text(value, text_of):
    is_short = hasattr(value, "get_params") and text_of is not repr
    return type(value).__name__ if is_short else " ".join(text_of(value).split())


# More lines than colours of matplotlib's usual cycle, or long ones, are named beside
# the axes and not in them.
MOST_LINES_INSIDE = 6

# More names than these do not fit beside the axes.
MOST_NAMES = 12

# Characters of a layer's or a line's name.
LONGEST_NAME = 40


class LayerScoresDisplay:
    """Score against depth of the cut, with a line for each other setting.

    Make one with :meth:`from_search` or :meth:`from_estimator`.

    Parameters
    ----------
    layers : list of str
        The cut points, from the image to the logits.
    scores : dict of str to array of shape (n_layers,)
        For each line its name and its mean scores; NaN where there is none.
    deviations : dict of str to array of shape (n_layers,)
        Their standard deviations over the folds.
    score_name : str, default="score"
        What the scores are.
    best : tuple of (str, str, float), default=None
        Layer, other settings and score of what a search has chosen; ``None`` is the
        best score that there is.

    Attributes
    ----------
    ax_, figure_
        matplotlib's axes and figure, after a plot.
    best_ : tuple of (str, str, float)
        Layer, other settings and score of the best, which is marked by a star: with
        equal scores, the one that the search has chosen.

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

    def __init__(self, *, layers, scores, deviations, score_name="score", best=None):
        self.layers = list(layers)
        self.scores = {name: np.asarray(line, float) for name, line in scores.items()}
        self.deviations = {
            name: np.asarray(line, float) for name, line in deviations.items()
        }
        self.score_name = score_name
        self.best = best
        lines = [*self.scores.values(), *self.deviations.values()]
        if not lines or any(line.shape != (len(self.layers),) for line in lines):
            raise ValueError(
                "There must be lines, of as many numbers as there are layers."
            )
        if not any(np.isfinite(line).any() for line in self.scores.values()):
            raise ValueError("There is no score to draw: all fits failed.")

    @classmethod
    def from_search(cls, search, *, metric=None, ax=None):
        """Draw the scores of a search that has been fitted.

        If no two candidates differ in `layer` alone, as in a randomized search over a
        continuous parameter, the best candidate of each layer is drawn.

        Parameters
        ----------
        search : GridSearchCV or another search with ``cv_results_``
            Over the `layer` of a transformer, and any other parameters.
        metric : str, default=None
            Which of the scores, if the search has several; ``None`` is that of `refit`.
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
        axes_library()
        if not hasattr(search, "cv_results_"):
            raise NotFittedError(
                "from_search draws a fitted search, which has cv_results_; got "
                f"{type(search).__name__}."
            )
        results, rows = last_round(search.cv_results_)
        metric = metric_of(search, results, metric)
        scores = results[f"mean_test_{metric}"]
        deviations = results[f"std_test_{metric}"]
        places, lines = arrange(results["params"], scores, search.estimator)
        layers = list(dict.fromkeys(name for _, name in sorted(set(places.values()))))
        best = None
        chosen = chosen_row(search, metric, rows)
        if chosen in places:
            best = places[chosen][1], lines[chosen], float(scores[chosen])
        drawn = _best_by_layer(places, lines, scores, chosen)
        names = dict.fromkeys(drawn.values())
        table = {name: np.full((2, len(layers)), np.nan) for name in names}
        for index, name in drawn.items():
            column = layers.index(places[index][1])
            table[name][:, column] = scores[index], deviations[index]
        display = cls(
            layers=layers,
            scores={name: line[0] for name, line in table.items()},
            deviations={name: line[1] for name, line in table.items()},
            score_name=score_name_of(search, metric),
            best=best,
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

        Each image crosses the network once: where the estimator has no `cache`, it
        gets one for the time of this call.

        Parameters
        ----------
        estimator : Pipeline or other estimator
            With a `CNNFeatureTransformer` in it. It is cloned, not changed.
        X : sequence of n images
            Of any kind that the estimator takes.
        y : array of shape (n,)
            What they show.
        layers : "all" or list, default="all"
            The cut points, as the parameter `layer` takes them. ``"all"`` is all main
            ones that images of this size get to.
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
        axes_library()
        estimator = clone(estimator)
        params = estimator.get_params()
        prefix = prefix_of_layer(params, params)
        if isinstance(layers, str) and layers == "all":
            step = params[prefix.removesuffix("__")] if prefix else estimator
            layers = _main_layers(step, X)
        layers = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        for layer in layers:  # is there such a one, before all the fits
            place_of(params[f"{prefix}backbone"], layer)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if not params[f"{prefix}cache"]:
                estimator.set_params(**{f"{prefix}cache": folder})
            search = GridSearchCV(
                estimator,
                {f"{prefix}layer": layers},
                cv=cv,
                scoring=scoring,
                n_jobs=n_jobs,
                refit=False,
                error_score="raise",
            ).fit(X, y)
        return cls.from_search(search, ax=ax)

    @property
    def best_(self):
        """Layer, other settings and score of the best."""
        if self.best is not None:
            return self.best
        names = list(self.scores)
        table = np.nan_to_num(np.array(list(self.scores.values())), nan=-np.inf)
        line, column = np.unravel_index(table.argmax(), table.shape)
        return self.layers[column], names[line], float(table[line, column])

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
        drawn = {
            name: line for name, line in self.scores.items() if np.isfinite(line).any()
        }
        width = max(6.4, 0.7 * len(self.layers) + 2)
        ax = axes_to_draw_on(ax, figsize=(width, 4.8))
        for number, (name, scores) in enumerate(drawn.items()):
            colour = _colour(number, len(drawn))
            there = np.isfinite(scores)
            at, mean = np.flatnonzero(there), scores[there]
            label = name if _is_named(number, len(drawn)) else None
            ax.plot(at, mean, "o-", color=colour, label=label, markersize=4)
            if len(drawn) <= MOST_LINES_INSIDE:
                spread = self.deviations[name][there]
                high = mean + spread
                if np.nanmax(self._all_scores()) <= 1:  # most scores end there
                    high = high.clip(max=1)
                ax.fill_between(
                    at, mean - spread, high, color=colour, alpha=0.1, linewidth=0
                )
        self._mark_best(ax)
        self._label_axes(ax)
        if any(drawn):
            _draw_legend(ax, len(drawn))
        self.ax_ = ax
        self.figure_ = ax.figure
        return self

    def _all_scores(self):
        return np.array(list(self.scores.values()))

    def _mark_best(self, ax):
        layer, line, score = self.best_
        column = self.layers.index(layer)
        ax.plot(
            column,
            score,
            "*",
            color="black",
            markersize=16,
            zorder=5,
            fillstyle="none",
        )
        ax.set_title(
            shorten(f"best: {layer}{', ' + line if line else ''} ({score:.3f})", 70),
            fontsize="medium",
            parse_math=False,
        )

    def _label_axes(self, ax):
        names = [shorten(layer, LONGEST_NAME) for layer in self.layers]
        is_long = max(map(len, names)) * len(names) > 60
        ax.set_xticks(
            range(len(names)),
            names,
            rotation=40 if is_long else 0,
            ha="right" if is_long else "center",
            rotation_mode="anchor" if is_long else "default",
            parse_math=False,
        )
        ax.set_xlabel("cut after")
        ax.set_ylabel(self.score_name.replace("_", " "))
        ax.grid(axis="y", alpha=0.3)


def _best_by_layer(places, lines, scores, chosen):
    """Return the line of each candidate, or of the best at each layer only.

    The latter if each line would be a single point.
    """
    of_lines = [lines[index] for index in places]
    if len(of_lines) < 2 or len(set(of_lines)) < len(of_lines):
        return {index: lines[index] for index in places}
    best: dict[str, int] = {}
    for index, (_, layer) in places.items():
        is_better = layer not in best or scores[index] > scores[best[layer]]
        is_chosen = index == chosen and scores[index] == scores[best.get(layer, index)]
        if is_better or is_chosen:
            best[layer] = index
    return dict.fromkeys(best.values(), f"best of {len(places)} candidates")


def _main_layers(transformer, X):
    """Return the main cut points that images of the transformer's size get to."""
    fitted = clone(transformer).set_params(layer=0, pooling="avg").fit(X)
    backbone, size = fitted.backbone_, fitted.preprocessing_.crop_size
    reached = reached_main_blocks(backbone, size)
    shapes = block_shapes(backbone, size, reached)
    return [
        name
        for name, block in skeleton(backbone).cut_points.items()
        if block in reached and can_pool(shapes[block], transformer.pooling)
    ]


def _colour(number, n):
    from matplotlib import colormaps

    return "C0" if n == 1 else colormaps["viridis"](0.85 * number / (n - 1))


def _is_named(number, n):
    """Tell whether a line has its name in the legend: of very many, only some have."""
    step = -(-n // MOST_NAMES)
    return number % step == 0


def _draw_legend(ax, n_lines):
    is_inside = n_lines <= MOST_LINES_INSIDE
    place = (
        {"loc": "best"}
        if is_inside
        else {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    )
    handles, names = ax.get_legend_handles_labels()
    legend = ax.legend(
        handles, [shorten(name, LONGEST_NAME) for name in names], frameon=False, **place
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
