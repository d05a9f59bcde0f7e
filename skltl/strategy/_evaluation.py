"""Evaluation of strategies: accuracy by backbone, layer, and number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import clone

from skltl._random import fresh_seed
from skltl.exceptions import WeightsError
from skltl.pretrained import PretrainedCNNClassifier, map_by_names
from skltl.strategy._comparison import Candidate, compare_backbones
from skltl.strategy._cross_validation import (
    Features,
    LabeledImages,
    Scores,
    Split,
    mean_and_error,
    sample_images,
    sample_rows,
    score_linear,
    split_folds,
    summarize,
)
from skltl.strategy._rules import (
    find_class_map,
    recommend_strategy,
    shared_parameters,
    similarity_of,
)

# Subsets of the training images of each fold, for the learning curve.
TRAIN_FRACTIONS = (0.25, 0.5)

# Fraction of the images that the pretrained classifier is evaluated on.
PRETRAINED_FRACTION = 0.2


def evaluate_strategies(
    advisor: Any, labeled: LabeledImages, transformers: Sequence[Any], seed: int | None
) -> tuple[Any, LabeledImages, dict[str, Features]]:
    """Set the measurements and the recommendation of an advisor.

    Return the transformer of the best backbone, fitted for all main layers, the images
    that were evaluated and their features by layer.
    """
    candidates = [Candidate(transformer) for transformer in transformers]
    seed = fresh_seed() if seed is None else seed
    task = labeled.task
    n_folds = min(advisor.cv, task.count_folds(labeled.targets, labeled.groups))
    evaluated = sample_images(labeled, advisor.max_images, n_folds, seed)
    splits = split_folds(evaluated, n_folds, seed)
    best = compare_backbones(candidates, evaluated, splits, n_folds, seed)
    advisor.targets_ = task.name
    advisor.n_images_, advisor.n_classes_ = len(labeled.targets), len(task.classes)
    advisor.n_smallest_ = task.count_smallest(labeled.targets)
    advisor.n_evaluated_, advisor.n_folds_ = len(evaluated.targets), n_folds
    advisor.n_repeats_ = -(-len(splits) // n_folds)
    _compare_backbones(advisor, candidates, best)
    transformer = best.transformer
    advisor.class_map_ = None
    if task.name == "classes":
        advisor.class_map_ = find_class_map(transformer, task.classes)
    advisor.as_is_score_, advisor.as_is_error_ = _score_pretrained(
        transformer, evaluated, advisor.class_map_, seed
    )
    _compare_layers(advisor, best.scores)
    layer = advisor.layer_
    by_size = _score_sizes(best, layer, evaluated, splits, seed)
    _compare_sizes(advisor, by_size)
    if transformer.layer == "last":
        transformer = clone(transformer).set_params(layer=advisor.best_layer_)
    advisor.strategy_ = recommend_strategy(
        *(advisor.n_images_, advisor.n_classes_, advisor.similarity_),
        transformer=transformer,
        n_smallest=advisor.n_smallest_,
        class_map=advisor.class_map_,
        targets=task.name,
    )
    return best.fitted, evaluated, best.features


def _compare_backbones(
    advisor: Any, candidates: Sequence[Candidate], best: Candidate
) -> None:
    """Set the fitted attributes that compare the backbones."""
    scores = {each.name: each.best_scores for each in candidates}
    advisor.backbone_scores_, advisor.backbone_errors_ = summarize(
        scores, advisor.n_folds_
    )
    advisor.backbone_layers_ = {each.name: each.best_layer for each in candidates}
    advisor.backbone_sizes_ = {each.name: len(each.rows) for each in candidates}
    advisor.best_backbone_ = best.name
    advisor.seconds_per_pass_ = best.seconds_per_pass(advisor.n_images_)


def _compare_layers(advisor: Any, by_layer: dict[str, Scores]) -> None:
    """Set the fitted attributes that follow from the scores by layer."""
    scores, errors = summarize(by_layer, advisor.n_folds_)
    *earlier, last = scores
    best = max(reversed(scores), key=lambda layer: scores[layer])  # the last of ties
    lead = 0.0, 0.0
    if earlier:
        best_earlier = max(earlier, key=lambda layer: scores[layer])
        leads = by_layer[best_earlier] - by_layer[last]
        lead = mean_and_error(leads, advisor.n_folds_)
    similarity, as_is_score = similarity_of(lead[0]), advisor.as_is_score_
    if as_is_score is not None and as_is_score + advisor.as_is_error_ >= scores[best]:
        similarity = "contained"
    advisor.layer_scores_, advisor.layer_errors_ = scores, errors
    advisor.best_layer_, advisor.lead_ = best, lead
    advisor.similarity_ = similarity
    advisor.layer_ = best if similarity == "different" else last


def _compare_sizes(advisor: Any, by_size: dict[int, Scores]) -> None:
    """Set the fitted attributes that follow from the scores by size."""
    advisor.size_scores_, advisor.size_errors_ = summarize(by_size, advisor.n_folds_)
    advisor.gain_ = 0.0, 0.0
    if len(by_size) > 1:
        smaller, larger = list(by_size)[-2:]
        gains = (by_size[larger] - by_size[smaller]) / np.log2(larger / smaller)
        advisor.gain_ = mean_and_error(gains, advisor.n_folds_)


def _score_sizes(
    candidate: Candidate,
    layer: str,
    labeled: LabeledImages,
    splits: list[Split],
    seed: int,
) -> dict[int, Scores]:
    """Return the score at a layer by number of training images, in each split."""
    by_size, strata = {}, labeled.strata
    for fraction in TRAIN_FRACTIONS:
        smaller = [
            (train[sample_rows(strata[train], fraction, 1, [seed, n])], test)
            for n, (train, test) in enumerate(splits)
        ]
        size = _mean_size(smaller)
        by_size[size] = score_linear(
            *(candidate.features[layer], labeled, smaller, seed),
            progress=f"{size} images" if candidate.transformer.verbose else "",
        )
    by_size[_mean_size(splits)] = candidate.scores[layer]
    return dict(sorted(by_size.items()))


def _mean_size(splits: list[Split]) -> int:
    """Return the mean number of training images."""
    return round(np.mean([len(train) for train, _ in splits]))


def _score_pretrained(
    transformer: Any, labeled: LabeledImages, class_map: Any, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Return the accuracy of the pretrained classifier and its standard error.

    It is evaluated on a sample of the images, and only if all classes are among its
    categories.
    """
    if class_map is None:
        return None, None
    targets, classes = labeled.targets, labeled.task.classes
    n_most = max(len(classes), round(PRETRAINED_FRACTION * len(targets)))
    sample = sample_images(labeled, min(n_most, len(targets) // 2), 1, seed)
    classifier: Any = PretrainedCNNClassifier()
    classifier.set_params(**shared_parameters(transformer, classifier))
    with sample.original_positions():
        try:
            categories = classifier.fit(sample.X).categories_.tolist()
        except WeightsError:  # the network has no head
            return None, None
        if map_by_names(classes, categories) is None:  # a file with another head
            return None, None
        classifier.set_params(class_map=class_map).fit(sample.X)
        predicted = classifier.predict(sample.X)
    is_right = predicted == classes[sample.targets]
    score = float(np.average(is_right, weights=sample.weights))
    return score, float(np.sqrt(score * (1 - score) / len(is_right)))
