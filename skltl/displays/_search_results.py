"""From the results of a search over cut points to lines along a network."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
from sklearn.base import clone, is_classifier, is_regressor

from skltl.backbones import Backbone, get_backbone, resolve_layer, skeleton


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
