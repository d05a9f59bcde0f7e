"""The boxes, their borders, and that what is advised is configured as said."""

import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from skltl import FineTunedCNNClassifier, PretrainedCNNClassifier, recommend_strategy


@pytest.mark.parametrize(
    ("n_images", "n_classes", "similarity", "name"),
    [
        (300, 5, "contained", "as_is"),
        (999, 2, "similar", "extract"),
        (1000, 2, "similar", "finetune"),
        (5000, 101, "similar", "extract"),
        (5050, 101, "similar", "finetune"),
        (300, 5, "different", "extract_early"),
        (5000, 5, "different", "finetune_top"),
        (99_999, 5, "different", "finetune_top"),
        (100_000, 5, "different", "scratch"),
        (100_000, 5, "similar", "finetune"),
    ],
)
def test_each_box_has_its_way(n_images, n_classes, similarity, name):
    strategy = recommend_strategy(n_images, n_classes, similarity, backbone="tiny")

    assert strategy.name == name
    assert len(strategy.reasons) == 2
    assert all(reason.endswith(".") for reason in strategy.reasons)
    assert strategy.n_passes >= 1
    clone(strategy.estimator)


def test_estimators_are_what_the_names_say():
    def estimator(*size_and_similarity):
        return recommend_strategy(
            *size_and_similarity,
            backbone="tiny",
            layer="block2",
            image_shape=(8, 8),
            cache="folder",
        ).estimator

    as_is = estimator(300, 5, "contained")
    assert isinstance(as_is, PretrainedCNNClassifier)
    assert as_is.class_map == "learn"
    extract = estimator(300, 5, "similar")
    assert extract[0].layer == "last"
    assert extract[0].cache == "folder"
    assert isinstance(extract[-1], LogisticRegression)
    early = estimator(300, 5, "different")
    assert early[0].layer == "block2"
    assert isinstance(early[-1], LinearSVC)
    tuned = estimator(5000, 5, "similar")
    assert isinstance(tuned, FineTunedCNNClassifier)
    assert (tuned.layer, tuned.unfreeze) == ("last", "all")
    top = estimator(5000, 5, "different")
    assert (top.layer, top.unfreeze) == ("block2", "all")
    with_map = recommend_strategy(
        300, 2, "contained", backbone="tiny", class_map={"a": 1, "b": 2}
    )
    assert with_map.estimator.class_map == {"a": 1, "b": 2}
    scratch = estimator(500_000, 5, "different")
    assert (scratch.weights, scratch.head_epochs) == (None, 0)
    assert scratch.image_shape == (8, 8)


def test_an_earlier_layer_is_found_where_none_is_named():
    strategy = recommend_strategy(300, 5, "different", backbone="resnet18")

    assert strategy.estimator[0].layer == "layer3"


def test_sizes_and_words_that_mean_nothing_are_refused():
    for n_images in (0, 10.5, float("nan"), "10", True):
        with pytest.raises(ValueError, match="n_images must be a positive integer"):
            recommend_strategy(n_images, 5, "similar")
    with pytest.raises(ValueError, match="no layer 'bogus'|bogus"):
        recommend_strategy(10, 5, "similar", backbone="tiny", layer="bogus")
    with pytest.raises(ValueError, match="one of contained, similar, different"):
        recommend_strategy(10, 5, "alike")


def test_costs_are_those_of_the_estimator():
    short, usual = (
        recommend_strategy(5000, 5, "similar", backbone="tiny", **epochs).n_passes
        for epochs in ({"finetune_epochs": 2}, {})
    )

    assert (short, usual) == (1 + 3 * 2, 1 + 3 * 10)


def test_the_smallest_class_decides_what_is_small():
    few = recommend_strategy(5000, 2, "similar", backbone="tiny", n_smallest=10)

    assert few.name == "extract"
    assert "10 of the smallest class" in few.reasons[0]
