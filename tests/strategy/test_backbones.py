"""Comparison of backbones: who wins, on which images, at what cost."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import ttest_rel
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import (
    GridSearchCV,
    RepeatedStratifiedKFold,
    StratifiedGroupKFold,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    LayerScoresDisplay,
    Preprocessing,
    StrategyAdvisor,
    make_feature_pipeline,
)
from skltl.exceptions import UnknownBackboneError
from skltl.strategy import find_losers, restrict_splits, task_of


def coarse_network(name="coarse", seed=0):
    """Return a backbone whose features are mixed from four pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = {
            "stem": nn.Conv2d(3, 2, 1, stride=16),
            "block1": nn.Sequential(nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1)),
        }
    return Backbone.from_blocks(name, blocks, preprocessing=Preprocessing(32))


@pytest.fixture(scope="module")
def images():
    """300 digits of three classes."""
    rows, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels < 3)[:300]
    return rows[chosen] / 16, labels[chosen]


@pytest.fixture
def compared(images, make_transformer):
    """Advisor that has compared two backbones."""
    backbones = [coarse_network(), "tiny"]
    advisor = StrategyAdvisor(
        make_transformer(), backbones=backbones, cv=3, random_state=0
    )
    return advisor.fit(*images)


def test_the_best_backbone_and_its_layer_are_recommended(
    compared, images, make_transformer
):
    alone = StrategyAdvisor(make_transformer(), cv=3, random_state=0).fit(*images)

    assert compared.best_backbone_ == "tiny"
    assert compared.layer_scores_ == alone.layer_scores_
    assert compared.backbone_layers_["tiny"] == alone.best_layer_
    assert compared.backbone_scores_["tiny"] == alone.layer_scores_[alone.best_layer_]
    assert compared.strategy_.code == alone.strategy_.code
    assert compared.transformer_.backbone == "tiny"
    assert "backbones" not in repr(alone)


def test_a_clear_loser_is_evaluated_on_a_subset(compared, images, n_forward):
    """Its score is that of the same folds, restricted to 200 images."""
    X, y = images
    assert compared.backbone_sizes_ == {"coarse": 200, "tiny": 300}
    rng = np.random.default_rng(0)  # as many as possible of each class
    subset = np.sort(
        np.concatenate(
            [
                rng.permutation(np.flatnonzero(y == label))[
                    : round(200 / 300 * (y == label).sum())
                ]
                for label in range(3)
            ]
        )
    )
    folds = RepeatedStratifiedKFold(n_splits=3, n_repeats=3, random_state=0)
    layer = compared.backbone_layers_["coarse"]
    features = CNNFeatureTransformer(
        coarse_network(), image_shape=(8, 8), image_size=32, layer=layer
    ).fit_transform(X)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))
    scores = []
    for train, test in folds.split(X, y):
        train, test = np.intersect1d(train, subset), np.intersect1d(test, subset)
        probe.fit(features[train], y[train])
        scores.append(probe.score(features[test], y[test]))

    assert_allclose(compared.backbone_scores_["coarse"], np.mean(scores), rtol=1e-12)
    n_forward.clear()
    clone(compared).fit(X, y)
    assert sum(n_forward) == 300 + 200


def test_equal_backbones_stay_until_the_end_and_the_first_one_wins(
    images, make_transformer
):
    backbones = [coarse_network("one"), coarse_network("other")]
    advisor = StrategyAdvisor(make_transformer(), backbones=backbones, random_state=0)

    advisor.fit(*images)

    assert advisor.best_backbone_ == "one"
    assert advisor.backbone_sizes_ == {"one": 300, "other": 300}
    assert advisor.backbone_scores_["one"] == advisor.backbone_scores_["other"]


def test_few_images_are_all_evaluated_once(few_digits, make_transformer, n_forward):
    backbones = [coarse_network(), "tiny"]
    advisor = StrategyAdvisor(
        make_transformer(), backbones=backbones, cv=2, random_state=0
    )

    advisor.fit(*few_digits)

    assert advisor.backbone_sizes_ == {"coarse": 60, "tiny": 60}
    assert sum(n_forward) == 2 * 60


def test_the_report_says_which_backbone_and_layer_are_the_best(compared):
    lines = compared.report().splitlines()
    scores, errors = compared.backbone_scores_, compared.backbone_errors_

    layer = compared.backbone_layers_["tiny"]
    score, error = scores["tiny"], errors["tiny"]
    assert f"    tiny         {score:.3f} ({error:.3f}) at {layer}  best" in lines
    layer = compared.backbone_layers_["coarse"]
    score, error = scores["coarse"], errors["coarse"]
    assert (
        f"    coarse       {score:.3f} ({error:.3f}) at {layer}  clearly worse, on 200 "
        "images" in lines
    )
    assert "  of tiny, by layer:" in lines


def test_one_backbone_is_reported_as_before(few_digits, make_transformer):
    advisor = StrategyAdvisor(make_transformer(), cv=2, random_state=0)
    report = advisor.fit(*few_digits).report()

    listed = clone(advisor).set_params(backbones=["tiny"]).fit(*few_digits)

    assert listed.report() == report
    assert "at the best layer of each backbone" not in report


@pytest.mark.parametrize(
    ("backbones", "error", "words"),
    [
        ([], ValueError, "no backbone to compare"),
        (["tiny", "tiny"], ValueError, "2 backbones of the name 'tiny'"),
        (["tiny", "resnet51"], UnknownBackboneError, "resnet51"),
        ("tiny", (TypeError, ValueError), "list"),
    ],
)
def test_wrong_lists_are_refused(
    backbones, error, words, few_digits, make_transformer, n_forward
):
    transformer = make_transformer()
    with pytest.raises(error, match=words):
        StrategyAdvisor(transformer, backbones=backbones).fit(*few_digits)
    with pytest.raises(error, match=words):
        LayerScoresDisplay.from_estimator(transformer, *few_digits, backbones=backbones)
    assert not n_forward


def test_losers_are_those_of_a_corrected_t_test():
    """With 10 splits of 5 folds, the variance is (1/10 + 1/4) / (1/10) times larger."""
    rng = np.random.default_rng(0)
    best = 0.9 + 0.02 * rng.normal(size=10)
    noise = 0.02 * rng.normal(size=10)
    n_losers = 0
    for gap in np.linspace(0, 0.1, 41):
        worse = best - gap - noise + noise.mean()
        uncorrected = ttest_rel(best, worse).statistic
        is_loser = uncorrected / np.sqrt(3.5) > 2.2621571628  # 97.5 %, 9 degrees
        assert find_losers([worse, best], n_folds=5) == [is_loser, False]
        n_losers += is_loser
    assert 0 < n_losers < 41
    assert find_losers([best, best - 0.1], n_folds=5) == [False, False]


def test_restricted_splits_keep_groups_apart():
    rng = np.random.default_rng(0)
    y, groups = np.arange(120) % 2, rng.integers(20, size=120)
    splits = list(StratifiedGroupKFold(4).split(y, y, groups))
    rows = np.sort(rng.permutation(120)[:50])

    restricted = restrict_splits(splits, rows, task_of(y), y)

    assert len(restricted) == 4
    for (train, test), (all_train, all_test) in zip(restricted, splits, strict=True):
        assert set(rows[train]) == set(rows) & set(all_train)
        assert set(rows[test]) == set(rows) & set(all_test)
        assert not set(groups[rows[train]]) & set(groups[rows[test]])
    one_class = [([0, 2, 4], [1])]
    assert restrict_splits(one_class, np.arange(5), task_of(y), y) == []


def test_the_display_compares_backbones_in_about_one_pass(images, n_forward):
    X, y = images
    pipeline = make_feature_pipeline(
        "tiny", "softmax", image_shape=(8, 8), image_size=32
    )

    display = LayerScoresDisplay.from_estimator(
        pipeline, X, y, backbones=[coarse_network(), "tiny"], cv=3
    )

    assert sum(n_forward) == 300 + 200
    expected = cross_val_score(pipeline.set_params(feat__layer="block3"), X, y, cv=3)
    assert display.layers[0] == "coarse stem"
    position = display.layers.index("tiny block3")
    assert_allclose(display.scores["backbone=tiny"][position], expected.mean())
    lines = ["backbone=coarse, on 200 images", "backbone=tiny"]
    assert [line.get_label() for line in display.lines_] == lines
    layer, line, score = display.best_
    assert layer.startswith("tiny ")
    assert line == "backbone=tiny"
    assert score == np.nanmax(display.scores[line])


def test_the_display_compares_backbones_for_labels(images):
    X, digits = images
    Y = np.column_stack([digits > 0, digits == 2]).astype(int)
    pipeline = make_feature_pipeline("tiny", "svm", image_shape=(8, 8), image_size=32)

    display = LayerScoresDisplay.from_estimator(
        pipeline, X, Y, backbones=[coarse_network(), "tiny"], layers=["last"], cv=3
    )

    expected = cross_val_score(pipeline, X, Y, cv=3).mean()
    position = display.layers.index("tiny block4")
    assert display.scores["backbone=tiny"][position] == pytest.approx(expected)


def test_a_loser_with_a_lucky_subset_is_not_the_best(images, monkeypatch):
    """Scores on fewer images do not compete with those on all."""
    pipeline = make_feature_pipeline(
        "tiny", "softmax", image_shape=(8, 8), image_size=32
    )
    monkeypatch.setattr(
        "skltl.displays._candidates.find_losers", lambda scores, n: [True, False]
    )

    display = LayerScoresDisplay.from_estimator(
        pipeline, *images, backbones=["tiny", coarse_network()], layers=["last"], cv=3
    )

    assert display.layers == ["tiny block4", "coarse block1"]
    assert display.best_[:2] == ("coarse block1", "backbone=coarse")


def test_a_search_over_backbones_and_layers_shares_the_cache(
    few_digits, n_forward, tmp_path
):
    pipeline = make_feature_pipeline(
        "tiny", "softmax", image_shape=(8, 8), image_size=32, cache=tmp_path
    )
    grid = [
        {"feat__backbone": ["tiny"], "feat__layer": ["block2", "block3", "last"]},
        {"feat__backbone": [coarse_network()], "feat__layer": ["stem", "last"]},
    ]

    search = GridSearchCV(pipeline, grid, cv=3).fit(*few_digits)

    assert sum(n_forward) == 2 * 60
    assert search.best_params_["feat__backbone"] == "tiny"
    both = GridSearchCV(
        pipeline,
        {"feat__backbone": ["tiny", coarse_network()], "feat__layer": [0, -2, "last"]},
        cv=3,
    )
    both.fit(*few_digits)
    assert sum(n_forward) <= 3 * 60  # layers that were not stored: one more pass
    assert np.isfinite(both.cv_results_["mean_test_score"]).all()
