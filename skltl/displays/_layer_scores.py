"""``LayerScoresDisplay``: cross-validated score by layer."""

from __future__ import annotations

from itertools import chain
from numbers import Integral, Real
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from skltl.displays._candidates import (
    candidates_of,
    resolve_metric,
    search_backbones,
)
from skltl.displays._layout import import_pyplot, line_style, resolve_ax
from skltl.exceptions import shorten
from skltl.features import poolable_layers
from skltl.networks import (
    Backbone,
    get_backbone,
    resolve_layer,
    skeleton,
)
from skltl.strategy import check_backbones

# More lines than this have no bands, and their legend is beside the axes: names are
# long, and overlapping bands hide the lines.
MAX_LINES_WITH_BANDS = 6

# More entries do not fit into a legend beside the axes.
MAX_LEGEND_ENTRIES = 12

# Characters in the name of a layer or line.
MAX_NAME_LENGTH = 40


class LayerScoresDisplay:
    """Score by layer, with one line for each combination of the other parameters.

    Create one with :meth:`from_search` or :meth:`from_estimator`.

    Parameters
    ----------
    layers : list of str
        Names of the layers, from input to output.
    scores : dict of str to array of shape (n_layers,)
        Mean test scores by name of the line; NaN where a layer was not evaluated.
    deviations : dict of str to array of shape (n_layers,)
        Standard deviations of the scores over the folds.
    score_name : str, default="score"
        Name of the metric.
    best : tuple of (str, str, float), default=None
        Layer, line and score of the candidate chosen by a search; by default those of
        the highest score.

    Attributes
    ----------
    best_ : tuple of (str, str, float)
        Layer, line and score of the best candidate, marked by a star. Among equal
        scores it is the candidate that the search has chosen.
    lines_ : list of matplotlib Line2D
        Lines of the mean scores.
    fill_between_ : list of matplotlib PolyCollection
        Bands of one standard deviation; empty for more than 6 lines.
    best_marker_ : matplotlib Line2D
        Star at the best score.
    ax_ : matplotlib Axes
        Axes with the scores.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    CNNFeatureTransformer : With `cache`, a search over layers runs the network once.
    sklearn.model_selection.GridSearchCV : Search over the parameter `layer`.

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

    __module__ = "skltl"

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
                "scores and deviations must have at least one line, with one value "
                f"for each of the {len(self.layers)} layers."
            )
        if not any(np.isfinite(line).any() for line in self.scores.values()):
            raise ValueError("There is no score to plot: all fits failed.")

    @classmethod
    def from_search(cls, search, *, metric=None, ax=None, **kwargs):
        """Plot the scores of a fitted hyperparameter search.

        If no two candidates differ only in `layer`, as in a randomized search over a
        continuous parameter, the best candidate of each layer is plotted. Of a halving
        search, the last iteration is plotted.

        Parameters
        ----------
        search : GridSearchCV or another search with `cv_results_`
            Fitted search over the `layer` of a `CNNFeatureTransformer` or
            `FineTunedCNNClassifier`, and any other parameters.
        metric : str, default=None
            Name of the metric, if the search has several; by default that of `refit`.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``plot`` for the lines.

        Returns
        -------
        LayerScoresDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the search did not vary `layer`, has no such metric, or all its fits
            failed.
        """
        import_pyplot()
        if not hasattr(search, "cv_results_"):
            raise NotFittedError(
                "from_search needs a fitted search with cv_results_; got "
                f"{type(search).__name__}."
            )
        metric = resolve_metric(search, metric)
        candidates = candidates_of(search, metric)
        name = _score_name(search, metric)
        display = cls._from_candidates(candidates, search.estimator, name)
        return display.plot(ax=ax, **kwargs)

    @classmethod
    def _from_candidates(cls, candidates, estimator, score_name):
        """Arrange the candidates of a search by layer and line."""
        params = [candidate.params for candidate in candidates]
        layers, lines, order = _arrange(params, estimator)
        lines = [
            f"{line}{candidate.note}"
            for line, candidate in zip(lines, candidates, strict=True)
        ]
        chosen = [n for n, candidate in enumerate(candidates) if candidate.is_chosen]
        best = None
        if chosen:
            best = layers[chosen[0]], lines[chosen[0]], candidates[chosen[0]].mean
        plotted = range(len(candidates))
        has_notes = any(candidate.note for candidate in candidates)
        is_single = len(candidates) > 1 and len(set(lines)) == len(candidates)
        if is_single and not has_notes:  # a single score each
            plotted = _best_by_layer(layers, candidates)
            lines = [f"best of {len(candidates)} candidates"] * len(candidates)

        empty = np.full(len(order), np.nan)
        means = {lines[index]: empty.copy() for index in plotted}
        deviations = {lines[index]: empty.copy() for index in plotted}
        for index in plotted:
            position = order.index(layers[index])
            means[lines[index]][position] = candidates[index].mean
            deviations[lines[index]][position] = candidates[index].deviation
        return cls(
            layers=order,
            scores=means,
            deviations=deviations,
            score_name=score_name,
            best=best,
        )

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y,
        *,
        layers="all",
        backbones=None,
        cv=5,
        scoring=None,
        n_jobs=None,
        ax=None,
        **kwargs,
    ):
        """Cross-validate an estimator at several layers, and plot the scores.

        An estimator without `cache` gets a temporary one: a frozen network runs once
        on each image. With a `FineTunedCNNClassifier`, each score is that of a network
        which is fine-tuned from that layer.

        Several backbones are first compared on a subset of the images, a quarter but at
        least 200. Those that are clearly worse than the best one, by the criterion of
        `StrategyAdvisor`, are not evaluated on the others: their scores are those on
        the subset, and their names end with its size.

        Parameters
        ----------
        estimator : Pipeline or other estimator
            Estimator that is or contains a `CNNFeatureTransformer` or
            `FineTunedCNNClassifier`. It is cloned.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that the estimator accepts.
        y : array of shape (n,)
            Target values.
        layers : "all" or list, default="all"
            Values of the parameter `layer`. ``"all"`` stands for all main layers
            that an image of the estimator's size reaches.
        backbones : list of str or Backbone, default=None
            Values of the parameter `backbone`; by default that of the estimator.
        cv : int or splitter, default=5
            Cross-validation splits, as in scikit-learn's ``GridSearchCV``.
        scoring : str or callable, default=None
            Metric, as in scikit-learn's ``GridSearchCV``.
        n_jobs : int, default=None
            Number of parallel jobs, as in scikit-learn's ``GridSearchCV``.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``plot`` for the lines.

        Returns
        -------
        LayerScoresDisplay
            The plotted display.

        Raises
        ------
        TypeError
            If `backbones` is not a list.
        ValueError
            If the estimator has no parameter `layer`, or `backbones` is empty or has a
            name twice.
        """
        import_pyplot()
        estimator = clone(estimator)
        params = estimator.get_params()
        prefix = _layer_prefix(params, params)
        network = params[prefix.removesuffix("__")] if prefix else estimator
        if backbones is None:
            backbones = [network.backbone]
        check_backbones(backbones)
        options = {"cv": cv, "scoring": scoring, "n_jobs": n_jobs}
        searches = []
        for backbone in backbones:  # an unknown layer is an error before any fit
            network.set_params(backbone=backbone)
            grid = {f"{prefix}layer": _resolve_layers(network, layers)}
            if len(backbones) > 1:
                grid[f"{prefix}backbone"] = [backbone]
            search = GridSearchCV(
                estimator, grid, refit=False, error_score="raise", **options
            )
            searches.append(search)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if not network.cache:
                network.set_params(cache=folder)
            candidates = search_backbones(searches, X, y)
        name = _score_name(searches[0], resolve_metric(searches[0], None))
        display = cls._from_candidates(candidates, estimator, name)
        return display.plot(ax=ax, **kwargs)

    @property
    def best_(self):
        """Layer, line and score of the best candidate."""
        if self.best is not None:
            return self.best
        names = list(self.scores)
        table = np.array(list(self.scores.values()))
        line, layer = np.unravel_index(np.nanargmax(table), table.shape)
        return self.layers[layer], names[line], float(table[line, layer])

    def plot(self, *, ax=None, **kwargs):
        """Plot the scores.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``plot`` for the lines.

        Returns
        -------
        LayerScoresDisplay
            The display itself.
        """
        ax = resolve_ax(ax, figsize=(max(6.4, 0.7 * len(self.layers) + 2), 4.8))
        scored = {
            name: line for name, line in self.scores.items() if np.isfinite(line).any()
        }
        has_bands = len(scored) <= MAX_LINES_WITH_BANDS
        # Most metrics end at 1, and so do their bands.
        limit = 1 if max(map(np.nanmax, scored.values())) <= 1 else np.inf
        label_every = -(-len(scored) // MAX_LEGEND_ENTRIES)
        self.lines_, self.fill_between_ = [], []
        for number, (name, mean) in enumerate(scored.items()):
            label = None if number % label_every else shorten(name, MAX_NAME_LENGTH)
            style = {"color": _color(number, len(scored)), "label": label}
            style |= {"marker": "o", "markersize": 4}
            x = np.flatnonzero(np.isfinite(mean))  # gaps are bridged
            mean, deviation = mean[x], self.deviations[name][x]
            (line,) = ax.plot(x, mean, **line_style(style, kwargs))
            self.lines_.append(line)
            if has_bands:
                low, high = mean - deviation, np.minimum(mean + deviation, limit)
                style = {"color": line.get_color(), "alpha": 0.1, "linewidth": 0}
                self.fill_between_.append(ax.fill_between(x, low, high, **style))
        self._mark_best(ax)
        self._label_axes(ax)
        if any(scored):  # a single line without a name needs no legend
            _add_legend(ax, is_inside=has_bands)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _mark_best(self, ax):
        layer, line, score = self.best_
        (self.best_marker_,) = ax.plot(
            self.layers.index(layer),
            score,
            "*",
            color="black",
            markersize=16,
            fillstyle="none",
            zorder=5,
        )
        title = f"best: {layer}{', ' + line if line else ''} ({score:.3f})"
        ax.set_title(shorten(title, 70), fontsize="medium", parse_math=False)

    def _label_axes(self, ax):
        names = [shorten(layer, MAX_NAME_LENGTH) for layer in self.layers]
        is_long = max(map(len, names)) * len(names) > 60
        ax.set_xticks(
            range(len(names)),
            names,
            rotation=40 if is_long else 0,
            ha="right" if is_long else "center",
            rotation_mode="anchor" if is_long else "default",
            parse_math=False,
        )
        ax.set(xlabel="layer", ylabel=self.score_name.replace("_", " "))
        ax.grid(axis="y", alpha=0.3)


def _score_name(search, metric):
    """Return the name of the metric; for "score", that of the estimator's `score`."""
    if metric != "score":
        return metric
    if isinstance(search.scoring, str):
        return search.scoring
    if search.scoring is None and is_classifier(search.estimator):
        return "accuracy"
    if search.scoring is None and is_regressor(search.estimator):
        return "R²"
    return "score"


def _best_by_layer(layers, candidates):
    """Return the best candidate of each layer; of equal ones, the chosen or first."""
    best: dict = {}
    for index, (layer, candidate) in enumerate(zip(layers, candidates, strict=True)):
        current = candidates[best.setdefault(layer, index)]
        is_equal = candidate.mean == current.mean
        if candidate.mean > current.mean or (candidate.is_chosen and is_equal):
            best[layer] = index
    return list(best.values())


def _arrange(candidates, estimator):
    """Return the layer and line of each candidate, and the layers sorted by depth.

    Backbones follow one another in the order of the candidates.
    """
    varied = dict.fromkeys(chain(*candidates))
    prefix = _layer_prefix(varied, estimator.get_params())
    settings = [
        clone(estimator).set_params(**clone(candidate, safe=False)).get_params()
        for candidate in candidates
    ]
    backbones = [params[f"{prefix}backbone"] for params in settings]
    names = [get_backbone(backbone).name for backbone in backbones]
    names = _numbered(names, list(map(_identity, backbones)))
    order = list(dict.fromkeys(names))
    layers, depths = [], {}
    for params, backbone, name in zip(settings, backbones, names, strict=True):
        depth, layer = _depth_and_name(backbone, params[f"{prefix}layer"])
        layers.append(f"{name} {layer}" if len(order) > 1 else layer)
        depths[layers[-1]] = (order.index(name), *depth)
    others = [
        {name: value for name, value in params.items() if name != f"{prefix}layer"}
        for params in candidates
    ]
    return layers, _line_names(others), sorted(depths, key=depths.__getitem__)


def _layer_prefix(names, params):
    """Return the prefix of the nested parameter `layer`, such as ``"feat__"``."""
    for name in names:
        prefix = name.removesuffix("layer")
        if name.endswith("layer") and f"{prefix}backbone" in params:
            return prefix
    raise ValueError(
        "There is no parameter 'layer' of a CNNFeatureTransformer or "
        "FineTunedCNNClassifier among "
        f"{', '.join(sorted(names)) or 'the varied ones'}."
    )


def _depth_and_name(backbone, layer):
    """Return a key that sorts values of `layer` by depth, and the name of the layer."""
    backbone = get_backbone(backbone)
    names = layer if isinstance(layer, (list, tuple)) else [layer]
    layers = [resolve_layer(backbone, name) for name in names]
    blocks = list(skeleton(backbone, backbone.preprocessing.size).blocks)
    depth = max(blocks.index(layer.block) for layer in layers)
    name = " + ".join(layer.name for layer in layers)
    return (depth, len(layers)), name


def _resolve_layers(estimator, layers):
    """Return the values of `layer` as a list; raise an error for unknown ones."""
    if isinstance(layers, str) and layers == "all":
        return list(poolable_layers(estimator))
    is_sequence = isinstance(layers, (list, tuple, np.ndarray))
    layers = list(layers) if is_sequence else [layers]
    for layer in layers:
        _depth_and_name(estimator.backbone, layer)
    return layers


def _line_names(settings):
    """Name lines by their parameters; briefly, if that is unambiguous."""
    if not any(settings):
        return [""] * len(settings)
    keys = [_identity(params) for params in settings]
    for is_exact in (False, True):
        names = [_describe(params, is_exact) for params in settings]
        if len(set(names)) == len(set(keys)):
            return names
    return _numbered(names, keys)


def _describe(params, is_exact):
    """Write parameters as text: exactly, or as last names and three digits."""
    texts = []
    for name, value in params.items():
        is_float = isinstance(value, Real) and not isinstance(value, Integral)
        if isinstance(value, Backbone):
            text = value.name
        elif hasattr(value, "get_params"):
            text = repr(value) if is_exact else type(value).__name__
        else:
            text = f"{value:.3g}" if is_float and not is_exact else str(value)
        name = name if is_exact else name.rpartition("__")[2]
        texts.append(f"{name}={' '.join(text.split())}")
    return ", ".join(texts) or "as given"


def _numbered(names, keys):
    """Append a number to equal names that have different keys."""
    by_name: dict = {name: [] for name in names}
    for name, key in zip(names, keys, strict=True):
        if key not in by_name[name]:
            by_name[name].append(key)
    return [
        f"{name} ({by_name[name].index(key) + 1})" if len(by_name[name]) > 1 else name
        for name, key in zip(names, keys, strict=True)
    ]


def _identity(value):
    """Return a hashable value that is equal for equal parameters."""
    if isinstance(value, Backbone):  # two of them may have the same name
        return value
    if hasattr(value, "get_params") and not isinstance(value, type):
        value = {"class": type(value), **value.get_params(deep=False)}
    if isinstance(value, dict):
        return tuple((name, _identity(part)) for name, part in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    return str(value)


def _color(number, n):
    from matplotlib import colormaps

    return "C0" if n == 1 else colormaps["viridis"](0.85 * number / (n - 1))


def _add_legend(ax, is_inside):
    """Add a legend inside the axes, or on their right side."""
    outside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    legend = ax.legend(frameon=False, **({} if is_inside else outside))
    for text in legend.get_texts():
        text.set_parse_math(False)
