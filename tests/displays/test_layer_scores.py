"""The display shows the search's own scores, in the order of the network."""

import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy.stats import loguniform
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    LayerScoresDisplay,
    Preprocessing,
    make_feature_pipeline,
)
from skltl.inference import Runner

LABELS = np.arange(9) % 3
ALL = ["stem", "block1", "block2", "block3", "block4"]


@pytest.fixture
def pipeline():
    return make_feature_pipeline("tiny", "softmax", image_size=32)


def test_lines_are_the_scores_of_the_search_by_depth(pipeline, images):
    grid = {
        "feat__layer": ["last", "stem", 2, ["stem", "block3"]],
        "softmax__C": [0.1, 10],
    }
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["stem", "block2", "stem + block3", "block4"]
    means = search.cv_results_["mean_test_score"].reshape(4, 2)
    deviations = search.cv_results_["std_test_score"].reshape(4, 2)
    for column, line in enumerate(["C=0.1", "C=10"]):
        order = [1, 2, 3, 0]
        np.testing.assert_array_equal(display.scores[line], means[order, column])
        np.testing.assert_array_equal(
            display.deviations[line], deviations[order, column]
        )
    assert display.best_[2] == search.best_score_
    assert display.score_name == "accuracy"


def test_what_is_drawn_is_what_is_held(pipeline, images):
    search = GridSearchCV(pipeline, {"feat__layer": ALL}, cv=3).fit(images, LABELS)
    _, ax = plt.subplots()

    display = LayerScoresDisplay.from_search(search, ax=ax)

    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    line, star = ax.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), display.scores[""])
    assert [text.get_text() for text in ax.get_xticklabels()] == ALL
    assert star.get_ydata()[0] == search.best_score_
    assert display.best_[0] in ax.get_title()


def test_candidates_that_were_not_tried_leave_a_gap(pipeline, images):
    grid = [
        {"feat__layer": ["stem", "block2"], "softmax__C": [1]},
        {"feat__layer": ["block1"], "softmax__C": [10]},
    ]
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["stem", "block1", "block2"]
    assert np.isnan(display.scores["C=1"]).tolist() == [False, True, False]
    assert np.isnan(display.scores["C=10"]).tolist() == [True, False, True]


def test_one_of_several_metrics_is_chosen(pipeline, images):
    search = GridSearchCV(
        pipeline,
        {"feat__layer": ["stem", "block2"]},
        scoring=["accuracy", "f1_macro"],
        refit=False,
        cv=3,
    ).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search, metric="f1_macro")

    np.testing.assert_array_equal(
        display.scores[""], search.cv_results_["mean_test_f1_macro"]
    )
    assert display.score_name == "f1_macro"
    with pytest.raises(ValueError, match="the search has accuracy, f1_macro"):
        LayerScoresDisplay.from_search(search)


def test_a_pipeline_is_scored_at_all_its_cut_points_in_one_pass(
    pipeline, images, monkeypatch
):
    expected = [
        cross_val_score(
            pipeline.set_params(feat__layer=layer), images, LABELS, cv=3
        ).mean()
        for layer in ALL
    ]
    n_crossed = []
    features = Runner.features

    def counted(self, pixels, *others):
        n_crossed.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(Runner, "features", counted)
    pipeline.set_params(feat__layer="last")

    display = LayerScoresDisplay.from_estimator(pipeline, images, LABELS, cv=3)

    assert display.layers == ALL
    np.testing.assert_array_equal(display.scores[""], expected)
    assert sum(n_crossed) == len(images)
    assert pipeline.get_params()["feat__cache"] is None


def test_all_cut_points_are_those_that_small_images_get_to(images):
    pipeline = make_pipeline(
        CNNFeatureTransformer("vgg11", weights=None, random_state=0, image_size=8),
        LogisticRegression(),
    )

    display = LayerScoresDisplay.from_estimator(pipeline, images, LABELS, cv=3)

    assert display.layers == ["block1", "block2", "block3"]


def test_estimators_without_a_network_are_refused(images):
    tree = DecisionTreeClassifier()
    search = GridSearchCV(tree, {"max_depth": [1, 2]}, cv=3).fit(
        images.reshape(9, -1), LABELS
    )

    with pytest.raises(ValueError, match="no parameter 'layer' .* among max_depth"):
        LayerScoresDisplay.from_search(search)
    with pytest.raises(ValueError, match="no parameter 'layer'"):
        LayerScoresDisplay.from_estimator(tree, images, LABELS)


@pytest.mark.parametrize("n_lines", [1, 3, 12, 31])
def test_many_lines_and_long_names_are_drawn(n_lines):
    layers = [f"features.denseblock{number}" for number in range(12)]
    rng = np.random.default_rng(0)
    scores = {f"{n}, " * 30: rng.random(12) for n in range(n_lines)}
    spread = {line: np.full(12, 0.05) for line in scores}

    display = LayerScoresDisplay(
        layers=layers, scores=scores, deviations=spread, score_name="accuracy"
    ).plot()

    display.figure_.canvas.draw()
    boxes = [text.get_window_extent() for text in display.ax_.get_xticklabels()]
    ends = [box.x1 for box in boxes]
    assert ends == sorted(ends)
    assert len(display.ax_.get_lines()) == n_lines + 1
    legend = display.ax_.get_legend().get_window_extent()
    assert legend.height < display.figure_.bbox.height
    assert display.ax_.get_window_extent().width > display.figure_.bbox.width / 3


def test_failed_fits_and_grids_without_a_layer_are_left_out(pipeline, images):
    grid = [
        {"softmax__C": [0.1]},
        {"feat__layer": ["stem", "block9"], "softmax__C": [0.1]},
        {"feat__layer": ["stem"], "softmax__C": [-1]},
    ]
    search = GridSearchCV(pipeline, grid, cv=3, error_score=np.nan, refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search.fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["stem", "block4"]
    assert list(display.scores) == ["C=0.1"]


def test_settings_of_one_name_are_told_apart(images):
    pipeline = make_pipeline(
        CNNFeatureTransformer("tiny", image_size=32), DecisionTreeClassifier()
    )
    grid = {
        "cnnfeaturetransformer__layer": ["stem", "block1"],
        "cnnfeaturetransformer__random_state": [0, 1],
        "decisiontreeclassifier__random_state": [0, 1],
        "decisiontreeclassifier__ccp_alpha": [1e-4, 1.00000001e-4],
    }
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert len(display.scores) == 8
    assert display.best_[2] == search.best_score_


def test_networks_stand_one_after_the_other(pipeline, images):
    pipeline.set_params(feat__weights=None, feat__random_state=0)
    grid = {"feat__backbone": ["tiny", "squeezenet1_1"], "feat__layer": ["stem", -1]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == [
        "tiny stem",
        "tiny block4",
        "squeezenet1_1 stem",
        "squeezenet1_1 fire9",
    ]


def test_of_a_search_in_rounds_the_last_counts(pipeline, images):
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingGridSearchCV

    X, y = np.concatenate([images] * 6), np.concatenate([LABELS] * 6)
    search = HalvingGridSearchCV(
        pipeline, {"feat__layer": ALL}, cv=3, random_state=0, min_resources=18
    ).fit(X, y)

    display = LayerScoresDisplay.from_search(search)

    assert search.n_iterations_ > 1
    assert display.best_[2] == search.best_score_


def test_unknown_layers_and_bad_images_are_named_at_once(pipeline, images):
    with pytest.raises(ValueError, match="no layer 'blok2'.*block2"):
        LayerScoresDisplay.from_estimator(
            pipeline, images, LABELS, layers=["block1", "blok2"]
        )
    with pytest.raises(ValueError, match="Image . .'missing.png'."):
        LayerScoresDisplay.from_estimator(
            pipeline, ["missing.png"] * 9, LABELS, layers="block1", cv=3
        )


def test_what_cannot_be_drawn_is_refused():
    nothing = {"C=1": [np.nan, np.nan]}
    with pytest.raises(ValueError, match="all fits failed"):
        LayerScoresDisplay(layers=["a", "b"], scores=nothing, deviations=nothing)
    with pytest.raises(ValueError, match="one value for each of the 1 layers"):
        LayerScoresDisplay(layers=["a"], scores={"": [1, 2]}, deviations={"": [1, 2]})
    with pytest.raises(ValueError, match="cv_results_; got Pipeline"):
        LayerScoresDisplay.from_search(make_feature_pipeline("tiny"))


@pytest.mark.parametrize("order", [["block1", "block3"], ["block3", "block1"]])
def test_the_star_is_what_the_search_has_chosen(order, pipeline, images):
    """Of two layers with equal scores, the search takes the first that was tried."""
    search = GridSearchCV(
        pipeline, {"feat__layer": order}, cv=3, scoring=lambda *_: 0.5
    ).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert search.best_params_ == {"feat__layer": order[0]}
    assert display.best_ == (order[0], "", 0.5)
    assert f"best: {order[0]}" in display.ax_.get_title()
    assert display.layers == ["block1", "block3"]
    *_, star = display.ax_.get_lines()
    assert star.get_xdata()[0] == display.layers.index(order[0])


def test_the_metric_is_that_of_the_refit(pipeline, images):
    search = GridSearchCV(
        pipeline,
        {"feat__layer": ["block3", "block1"]},
        scoring={
            "constant": lambda *_: 0.5,
            "depth": lambda fitted, *_: float(fitted[0].layer == "block1"),
        },
        refit="constant",
        cv=3,
    ).fit(images, LABELS)

    of_refit = LayerScoresDisplay.from_search(search)
    other = LayerScoresDisplay.from_search(search, metric="depth")

    assert of_refit.score_name == "constant"
    assert of_refit.best_[0] == search.best_params_["feat__layer"] == "block3"
    assert other.best_ == ("block1", "", 1.0)


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
    np.testing.assert_array_equal(display.scores["best of 8 candidates"], expected)
    best = search.best_params_
    settings = f"C={best['softmax__C']:.3g}"
    assert display.best_ == (best["feat__layer"], settings, search.best_score_)
    assert settings in display.ax_.get_title()


def test_numbers_in_names_have_three_digits(pipeline, images):
    grid = {"feat__layer": ["stem", "block1"], "softmax__C": [1 / 3, 2e-7 / 3, 12]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert set(display.scores) == {"C=0.333", "C=6.67e-08", "C=12"}


def test_of_rounds_the_star_is_in_the_last(pipeline, images):
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingGridSearchCV

    X, y = np.concatenate([images] * 6), np.concatenate([LABELS] * 6)
    search = HalvingGridSearchCV(
        pipeline, {"feat__layer": ALL[::-1]}, cv=3, random_state=0, min_resources=18,
        scoring=lambda *_: 0.5,
    ).fit(X, y)  # fmt: skip

    display = LayerScoresDisplay.from_search(search)

    assert display.best_ == (search.best_params_["feat__layer"], "", 0.5)


def test_estimators_of_one_kind_have_a_line_each(images):
    steps = [("feat", CNNFeatureTransformer("tiny", image_size=32))]
    pipeline = Pipeline([*steps, ("last", LogisticRegression())])
    lasts = [LogisticRegression(C=c) for c in (1e-6, 1.0)]
    grid = {"feat__layer": ["block1", "block4"], "last": lasts}
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    means = search.cv_results_["mean_test_score"]
    of_lasts = {
        str(last): [
            mean
            for mean, params in zip(means, search.cv_results_["params"], strict=True)
            if params["last"] is last
        ]
        for last in lasts
    }
    assert len(display.scores) == 2
    for name, scores in of_lasts.items():
        np.testing.assert_array_equal(display.scores[f"last={name}"], scores)


def test_backbones_of_one_name_are_apart(images):
    def backbone(width):
        blocks = {
            "a": nn.Conv2d(3, width, 3, padding=1),
            "b": nn.Conv2d(width, width, 3, padding=1),
        }
        return Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(8))

    pipeline = make_pipeline(CNNFeatureTransformer("tiny"), LogisticRegression())
    name = "cnnfeaturetransformer"
    grid = {f"{name}__layer": ["a", "b"]}
    grid[f"{name}__backbone"] = [backbone(4), backbone(5)]
    pipeline.set_params(**{f"{name}__weights": "imagenet"})
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    of_both = [f"Backbone('mine') ({number})" for number in (1, 2)]
    assert display.layers == [f"{one} {layer}" for one in of_both for layer in "ab"]
    drawn = np.array(list(display.scores.values())).ravel()
    np.testing.assert_array_equal(
        np.sort(drawn[np.isfinite(drawn)]),
        np.sort(search.cv_results_["mean_test_score"]),
    )


def test_a_step_that_is_exchanged_brings_its_own_network(pipeline, images):
    others = [
        CNNFeatureTransformer("tiny", image_size=32),
        CNNFeatureTransformer(
            "squeezenet1_1", weights=None, random_state=0, image_size=32
        ),
    ]
    grid = [
        {"feat": others[:1], "feat__layer": ["block1"]},
        {"feat": others[1:], "feat__layer": ["fire2"]},
    ]
    search = GridSearchCV(pipeline, grid, cv=3).fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search)

    assert display.layers == ["tiny block1", "squeezenet1_1 fire2"]


def test_a_metric_named_score_is_one_of_several(pipeline, images):
    scoring = {"score": "accuracy", "other": lambda one, X, y: -one.score(X, y)}
    grid = {"feat__layer": ["stem", "block2", "block4"]}
    search = GridSearchCV(pipeline, grid, scoring=scoring, refit="other", cv=3)
    search.fit(images, LABELS)

    display = LayerScoresDisplay.from_search(search, metric="score")

    assert display.best_[2] == search.cv_results_["mean_test_score"].max()


def test_names_with_dollars_are_drawn_as_they_are():
    name = r"a$\b_$"
    scores = {name: np.array([0.5, 0.6]), "c": np.array([0.1, 0.2])}
    display = LayerScoresDisplay(
        layers=[name, "b"],
        scores=scores,
        deviations={line: np.zeros(2) for line in scores},
        score_name="accuracy",
    )

    display.plot().figure_.canvas.draw()  # an error if taken for a formula
