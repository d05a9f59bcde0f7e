"""The display shows the scores of a search, in the order of the network's layers."""

import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    LayerScoresDisplay,
    Preprocessing,
    make_feature_pipeline,
)

LABELS = np.arange(9) % 3
ALL = ["stem", "block1", "block2", "block3", "block4"]


class RandomFeatures(CNNFeatureTransformer):
    """Stand-in without a network: random projections that depend on the layer."""

    def fit(self, X, y=None):
        if self.layer == "block9":
            raise ValueError("no layer 'block9'")
        self.fitted_ = True
        return self

    def transform(self, X):
        seed = sum(map(ord, str(self.layer) + str(self.backbone)))
        flat = np.reshape(X, (len(X), -1)) / 255
        projection = np.random.default_rng(seed).normal(size=(flat.shape[1], 3))
        return flat @ projection


@pytest.fixture
def pipeline():
    steps = [("feat", RandomFeatures("tiny")), ("scale", StandardScaler())]
    return Pipeline([*steps, ("softmax", LogisticRegression())])


def search_of(pipeline, grid, images, **parameters):
    return GridSearchCV(pipeline, grid, cv=3, **parameters).fit(images, LABELS)


def test_lines_are_the_scores_by_depth(pipeline, images):
    grid = {
        "feat__layer": ["last", "stem", 2, ["stem", "block3"]],
        "softmax__C": [0.1, 10],
    }
    search = search_of(pipeline, grid, images)
    _, ax = plt.subplots()

    display = LayerScoresDisplay.from_search(search, ax=ax)

    assert display.layers == ["stem", "block2", "stem + block3", "block4"]
    order = [1, 2, 3, 0]
    means = search.cv_results_["mean_test_score"].reshape(4, 2)[order]
    deviations = search.cv_results_["std_test_score"].reshape(4, 2)[order]
    for column, name in enumerate(["C=0.1", "C=10"]):
        assert_array_equal(display.scores[name], means[:, column])
        assert_array_equal(display.deviations[name], deviations[:, column])
        line, band = display.lines_[column], display.fill_between_[column]
        assert line.get_label() == name
        assert_array_equal(line.get_ydata(), means[:, column])
        y = band.get_paths()[0].vertices[:, 1]
        high = (means + deviations)[:, column].clip(max=1)  # accuracies end at 1
        assert_allclose(y.min(), (means - deviations)[:, column].min())
        assert_allclose(y.max(), high.max())
    assert display.best_[2] == search.best_score_
    assert display.best_marker_.get_ydata() == [search.best_score_]
    assert display.best_[0] in ax.get_title()
    assert display.score_name == ax.get_ylabel() == "accuracy"
    assert [text.get_text() for text in ax.get_xticklabels()] == display.layers
    assert display.ax_ is ax
    assert display.figure_ is ax.figure


def test_display_accepts_keyword_arguments(pipeline, images):
    search = search_of(pipeline, {"feat__layer": ALL[:2]}, images)

    display = LayerScoresDisplay.from_search(search, c="red", lw=3, marker="s")

    (line,) = display.lines_
    assert to_rgb(line.get_color()) == to_rgb("red")
    assert (line.get_linewidth(), line.get_marker()) == (3, "s")
    (band,) = display.fill_between_
    assert to_rgb(band.get_facecolor()[0]) == to_rgb("red")


def test_untried_candidates_leave_a_gap(pipeline, images):
    grid = [
        {"feat__layer": ["stem", "block2"], "softmax__C": [1]},
        {"feat__layer": ["block1"], "softmax__C": [10]},
    ]

    display = LayerScoresDisplay.from_search(search_of(pipeline, grid, images))

    assert display.layers == ["stem", "block1", "block2"]
    assert np.isnan(display.scores["C=1"]).tolist() == [False, True, False]
    assert np.isnan(display.scores["C=10"]).tolist() == [True, False, True]
    assert display.lines_[0].get_xdata().tolist() == [0, 2]


def test_metric_is_chosen_by_name_or_refit(pipeline, images):
    grid = {"feat__layer": ["block3", "block1"]}
    scoring = {
        "constant": lambda *_: 0.5,
        "depth": lambda fitted, *_: float(fitted[0].layer == "block1"),
        "score": "accuracy",
    }
    search = search_of(pipeline, grid, images, scoring=scoring, refit="constant")
    without_refit = search_of(pipeline, grid, images, scoring=scoring, refit=False)

    of_refit = LayerScoresDisplay.from_search(search)
    other = LayerScoresDisplay.from_search(search, metric="depth")
    named_score = LayerScoresDisplay.from_search(search, metric="score")

    assert of_refit.score_name == "constant"
    assert of_refit.best_[0] == search.best_params_["feat__layer"] == "block3"
    assert other.best_ == ("block1", "", 1.0)
    assert named_score.best_[2] == search.cv_results_["mean_test_score"].max()
    with pytest.raises(ValueError, match="the search has constant, depth, score"):
        LayerScoresDisplay.from_search(without_refit)


def test_network_runs_once_for_all_layers(images, network_counts):
    pipeline = make_feature_pipeline("tiny", "softmax", image_size=32)
    expected = {}
    for layer in ("stem", "block3"):
        pipeline.set_params(feat__layer=layer)
        expected[layer] = cross_val_score(pipeline, images, LABELS, cv=3).mean()
    network_counts.clear()

    display = LayerScoresDisplay.from_estimator(pipeline, images, LABELS, cv=3)

    assert display.layers == ALL
    scores = dict(zip(ALL, display.scores[""], strict=True))
    assert {layer: scores[layer] for layer in expected} == expected
    assert sum(network_counts) == len(images)
    assert pipeline.get_params()["feat__cache"] is None


def test_all_layers_are_those_that_small_images_reach(images):
    blocks = {
        "conv": nn.Conv2d(3, 4, 3, padding=1),
        "pool": nn.MaxPool2d(4),
        "wide": nn.Conv2d(4, 4, 3),  # 2 x 2 is too small
    }
    backbone = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(16))
    pipeline = make_feature_pipeline(backbone, "softmax", image_size=8)

    display = LayerScoresDisplay.from_estimator(pipeline, images, LABELS, cv=3)

    assert display.layers == ["conv", "pool"]


def test_fine_tuning_is_compared_at_all_layers(images):
    blocks = {"conv": nn.Conv2d(3, 4, 3), "wide": nn.Conv2d(4, 4, 3)}
    backbone = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(8))
    classifier = FineTunedCNNClassifier(
        backbone, head_epochs=1, finetune_epochs=1, random_state=0
    )
    expected = [
        cross_val_score(classifier.set_params(layer=layer), images, LABELS, cv=3)
        for layer in blocks
    ]

    display = LayerScoresDisplay.from_estimator(classifier, images, LABELS, cv=3)

    assert display.layers == ["conv", "wide"]
    assert_array_equal(display.scores[""], np.mean(expected, axis=1))


def test_estimators_without_a_layer_are_refused(images):
    tree = DecisionTreeClassifier()
    flat = images.reshape(9, -1)
    search = GridSearchCV(tree, {"max_depth": [1, 2]}, cv=3).fit(flat, LABELS)

    with pytest.raises(ValueError, match="no parameter 'layer' .* among max_depth"):
        LayerScoresDisplay.from_search(search)
    with pytest.raises(ValueError, match="no parameter 'layer'"):
        LayerScoresDisplay.from_estimator(tree, images, LABELS)


def test_unknown_layers_and_unreadable_images_are_named(images):
    pipeline = make_feature_pipeline("tiny", "softmax", image_size=32)

    with pytest.raises(ValueError, match="no layer 'blok2'.*block2"):
        LayerScoresDisplay.from_estimator(
            pipeline, images, LABELS, layers=["block1", "blok2"]
        )
    with pytest.raises(ValueError, match="Image . .'missing.png'."):
        LayerScoresDisplay.from_estimator(
            pipeline, ["missing.png"] * 9, LABELS, layers="block1", cv=3
        )


def test_invalid_scores_are_refused():
    missing = {"C=1": [np.nan, np.nan]}

    with pytest.raises(ValueError, match="all fits failed"):
        LayerScoresDisplay(layers=["a", "b"], scores=missing, deviations=missing)
    with pytest.raises(ValueError, match="one value for each of the 1 layers"):
        LayerScoresDisplay(layers=["a"], scores={"": [1, 2]}, deviations={"": [1, 2]})
    with pytest.raises(ValueError, match="cv_results_; got Pipeline"):
        LayerScoresDisplay.from_search(make_feature_pipeline("tiny"))


@pytest.mark.parametrize(("n_lines", "n_labels"), [(3, 3), (12, 12), (31, 11)])
def test_many_lines_with_long_names_fit_into_the_figure(n_lines, n_labels):
    layers = [f"features.denseblock{number}" for number in range(12)]
    rng = np.random.default_rng(0)
    scores = {f"{n}, " * 30: rng.random(12) for n in range(n_lines)}
    deviations = {name: np.full(12, 0.05) for name in scores}

    display = LayerScoresDisplay(
        layers=layers, scores=scores, deviations=deviations
    ).plot()

    display.figure_.canvas.draw()
    boxes = [text.get_window_extent() for text in display.ax_.get_xticklabels()]
    ends = [box.x1 for box in boxes]
    assert ends == sorted(ends)
    assert len(display.lines_) == n_lines
    assert len(display.fill_between_) == (n_lines if n_lines <= 6 else 0)
    legend = display.ax_.get_legend()
    assert len(legend.get_texts()) == n_labels
    assert legend.get_window_extent().height < display.figure_.bbox.height
    assert display.ax_.get_window_extent().width > display.figure_.bbox.width / 3


def test_names_with_dollars_are_no_formulas():
    name = r"a$\b_$"
    scores = {name: np.array([0.5, 0.6]), "c": np.array([0.1, 0.2])}
    display = LayerScoresDisplay(layers=[name, "b"], scores=scores, deviations=scores)

    display.plot().figure_.canvas.draw()  # an error if parsed as a formula

    assert display.ax_.get_xticklabels()[0].get_text() == name


def test_failed_fits_are_left_out(pipeline, images):
    grid = [
        {"softmax__C": [0.1]},
        {"feat__layer": ["stem", "block9"], "softmax__C": [0.1]},
        {"feat__layer": ["stem"], "softmax__C": [-1]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = search_of(pipeline, grid, images, error_score=np.nan, refit=False)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["stem", "block4"]
    assert list(display.scores) == ["C=0.1"]


def test_values_in_line_names_have_three_digits(pipeline, images):
    grid = {"feat__layer": ["stem", "block1"], "softmax__C": [1 / 3, 2e-7 / 3, 12]}

    display = LayerScoresDisplay.from_search(search_of(pipeline, grid, images))

    assert list(display.scores) == ["C=0.333", "C=6.67e-08", "C=12"]


def test_ambiguous_line_names_are_exact(images):
    pipeline = make_pipeline(RandomFeatures("tiny"), DecisionTreeClassifier())
    grid = {
        "randomfeatures__layer": ["stem", "block1"],
        "randomfeatures__random_state": [0, 1],
        "decisiontreeclassifier__random_state": [0, 1],
        "decisiontreeclassifier__ccp_alpha": [1e-4, 1.00000001e-4],
    }
    search = search_of(pipeline, grid, images)

    display = LayerScoresDisplay.from_search(search)

    assert len(display.scores) == 8
    assert all("randomfeatures__random_state=" in name for name in display.scores)
    assert display.best_[2] == search.best_score_


def test_estimators_of_one_class_have_a_line_each(images):
    pipeline = Pipeline([("feat", RandomFeatures()), ("last", LogisticRegression())])
    lasts = [LogisticRegression(C=c) for c in (1e-6, 1.0)]
    grid = {"feat__layer": ["layer1", "layer4"], "last": lasts}
    search = search_of(pipeline, grid, images)

    display = LayerScoresDisplay.from_search(search)

    results = search.cv_results_
    assert len(display.scores) == 2
    for last in lasts:
        expected = [
            mean
            for mean, params in zip(
                results["mean_test_score"], results["params"], strict=True
            )
            if params["last"] is last
        ]
        assert_array_equal(display.scores[f"last={last}"], expected)


def test_backbones_follow_one_another(pipeline, images):
    grid = {"feat__backbone": ["tiny", "squeezenet1_1"], "feat__layer": ["stem", -1]}

    display = LayerScoresDisplay.from_search(search_of(pipeline, grid, images))

    assert display.layers == [
        "tiny stem",
        "tiny block4",
        "squeezenet1_1 stem",
        "squeezenet1_1 fire9",
    ]


def test_backbones_of_one_name_are_numbered(pipeline, images):
    backbones = [
        Backbone.from_blocks(
            "mine",
            {"a": nn.Conv2d(3, width, 3), "b": nn.Conv2d(width, width, 3)},
            preprocessing=Preprocessing(8),
        )
        for width in (4, 5)
    ]
    grid = {"feat__layer": ["a", "b"], "feat__backbone": backbones}
    search = search_of(pipeline, grid, images)

    display = LayerScoresDisplay.from_search(search)

    names = [f"mine ({number})" for number in (1, 2)]
    assert display.layers == [f"{name} {layer}" for name in names for layer in "ab"]
    scores = np.array(list(display.scores.values()))
    assert_array_equal(
        np.sort(scores[np.isfinite(scores)]),
        np.sort(search.cv_results_["mean_test_score"]),
    )


def test_exchanged_step_brings_its_own_backbone(pipeline, images):
    grid = [
        {"feat": [RandomFeatures("tiny")], "feat__layer": ["block1"]},
        {"feat": [RandomFeatures("squeezenet1_1")], "feat__layer": ["fire2"]},
    ]

    display = LayerScoresDisplay.from_search(search_of(pipeline, grid, images))

    assert display.layers == ["tiny block1", "squeezenet1_1 fire2"]


@pytest.mark.parametrize("order", [["block1", "block3"], ["block3", "block1"]])
def test_star_marks_the_chosen_one_of_equal_candidates(order, pipeline, images):
    """Of two layers with equal scores, the search takes the first that was tried."""
    grid = {"feat__layer": order}
    search = search_of(pipeline, grid, images, scoring=lambda *_: 0.5)

    display = LayerScoresDisplay.from_search(search)

    assert search.best_params_ == {"feat__layer": order[0]}
    assert display.best_ == (order[0], "", 0.5)
    assert f"best: {order[0]}" in display.ax_.get_title()
    assert display.layers == ["block1", "block3"]
    assert display.best_marker_.get_xdata()[0] == display.layers.index(order[0])


@pytest.mark.parametrize("scoring", [None, lambda *_: 0.5], ids=["accuracy", "equal"])
def test_last_iteration_of_a_halving_search_is_plotted(scoring, pipeline, images):
    X, y = np.concatenate([images] * 6), np.concatenate([LABELS] * 6)
    search = HalvingGridSearchCV(
        pipeline,
        {"feat__layer": ALL[::-1]},
        cv=3,
        random_state=0,
        min_resources=18,
        scoring=scoring,
    ).fit(X, y)

    display = LayerScoresDisplay.from_search(search)

    assert search.n_iterations_ > 1
    is_last = search.cv_results_["iter"] == search.n_iterations_ - 1
    assert len(display.layers) == is_last.sum()
    best = search.best_params_["feat__layer"]
    assert display.best_ == (best, "", search.best_score_)


def test_single_points_become_a_line_of_the_best(pipeline, images):
    search = RandomizedSearchCV(
        pipeline,
        {"feat__layer": ["stem", "block2"], "softmax__C": loguniform(1e-4, 10)},
        n_iter=8,
        cv=3,
        random_state=0,
    ).fit(images, LABELS)
    layers = search.cv_results_["param_feat__layer"]
    means = search.cv_results_["mean_test_score"]

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["stem", "block2"]
    assert list(display.scores) == ["best of 8 candidates"]
    expected = [means[layers == name].max() for name in display.layers]
    assert_array_equal(display.scores["best of 8 candidates"], expected)
    best = search.best_params_
    settings = f"C={best['softmax__C']:.3g}"
    assert display.best_ == (best["feat__layer"], settings, search.best_score_)
    assert settings in display.ax_.get_title()
