"""``StrategyAdvisor``: measurements by hand, their cost, the report and its nesting."""

import copy
import pickle

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torchvision.models import get_model

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    recommend_strategy,
)
from skltl.exceptions import EngineError
from skltl.networks import imagenet_names

MEASUREMENTS = (
    "layer_scores_",
    "layer_errors_",
    "lead_",
    "size_scores_",
    "size_errors_",
    "gain_",
)


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[1:101] / 16, labels[1:101]


@pytest.fixture(scope="module")
def advisor(digits, make_transformer):
    """Advisor that is fitted on 100 digits; tests do not change it."""
    return StrategyAdvisor(make_transformer(), random_state=0).fit(*digits)


def measurements(advisor):
    return {name: getattr(advisor, name) for name in MEASUREMENTS}


def test_scores_by_layer_are_those_of_scikit_learn(advisor, digits, make_transformer):
    X, y = digits
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=3, random_state=0)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))

    layers = ["stem", "block1", "block2", "block3", "block4"]
    assert list(advisor.layer_scores_) == layers
    for layer in ("stem", "block2", "block4"):
        features = make_transformer(layer=layer).fit_transform(X)
        scores = cross_val_score(probe, features, y, cv=folds)
        assert_allclose(advisor.layer_scores_[layer], scores.mean(), rtol=1e-12)
        # Nadeau and Bengio: the 15 splits share training images.
        variance = ((scores - scores.mean()) ** 2).sum() / 14
        error = (variance * (1 / 15 + 20 / 80)) ** 0.5
        assert_allclose(advisor.layer_errors_[layer], error, rtol=1e-9)


def test_digits_are_different_and_get_an_earlier_layer(advisor):
    scores = advisor.layer_scores_
    best = max(scores, key=scores.get)

    assert best != "block4"
    assert_allclose(advisor.lead_[0], scores[best] - scores["block4"], atol=1e-12)
    assert advisor.similarity_ == "different"
    assert advisor.best_layer_ == advisor.layer_ == best
    assert advisor.strategy_.name == "extract_early"
    assert advisor.strategy_.estimator[0].layer == best
    assert (advisor.n_images_, advisor.n_classes_) == (100, 10)


def test_the_score_with_all_images_is_that_of_the_layer(advisor, digits):
    *_, (size, score) = advisor.size_scores_.items()

    assert size == 80
    assert score == advisor.layer_scores_[advisor.layer_]
    assert advisor.size_errors_[size] == advisor.layer_errors_[advisor.layer_]


def test_similar_images_get_the_last_layer(digits, make_transformer):
    X, y = digits
    rows = (y < 3).nonzero()[0]

    advisor = StrategyAdvisor(make_transformer(), random_state=0).fit(X[rows], y[rows])

    assert advisor.lead_[0] < 0.01
    assert advisor.similarity_ == "similar"
    assert advisor.layer_ == "block4"
    assert advisor.strategy_.name == "extract"
    assert advisor.strategy_.estimator[0].layer == "last"
    score = list(advisor.size_scores_.values())[-1]
    assert score == advisor.layer_scores_["block4"]


def test_scores_by_size_are_those_of_a_learning_curve(
    advisor, digits, make_transformer
):
    """By hand: the training images of each fold are split once more."""
    X, y = digits
    features = make_transformer(layer=advisor.layer_).fit_transform(X)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=3, random_state=0)
    by_hand = []
    for number, (train, test) in enumerate(folds.split(X, y)):
        for fraction in (0.25, 0.5):
            part, _ = train_test_split(
                train, train_size=fraction, stratify=y[train], random_state=number
            )
            probe.fit(features[part], y[part])
            by_hand.append(probe.score(features[test], y[test]))

    assert_allclose(list(advisor.size_scores_), [20, 40, 80], atol=1)
    by_hand = np.reshape(by_hand, (15, 2))
    error = by_hand.std(axis=0) * np.sqrt(2 / 15)  # of the difference of two means
    found = list(advisor.size_scores_.values())
    assert (np.abs(found[:2] - by_hand.mean(axis=0)) < 3 * error).all()
    (before, low), (after, high) = list(advisor.size_scores_.items())[-2:]
    slope = (high - low) / np.log2(after / before)
    assert_allclose(advisor.gain_[0], slope, atol=1e-12)


def test_the_transformer_is_cloned_and_fitted(advisor, digits, make_transformer):
    X, _ = digits
    given = advisor.transformer

    assert not hasattr(given, "network_")
    assert given.get_params() == make_transformer().get_params()
    layers = list(advisor.layer_scores_)
    expected = make_transformer(layer=layers).fit_transform(X[:5])
    assert_array_equal(advisor.transformer_.transform(X[:5]), expected)
    assert advisor.n_features_in_ == 64


def test_parameters_of_the_transformer_are_nested(make_transformer):
    advisor = StrategyAdvisor(make_transformer(), cv=3)

    advisor.set_params(transformer__backbone="resnet18", cv=2)

    assert advisor.transformer.backbone == "resnet18"
    assert advisor.get_params()["transformer__image_shape"] == (8, 8)
    cloned = clone(advisor)
    assert cloned.transformer is not advisor.transformer
    assert cloned.transformer.get_params() == advisor.transformer.get_params()
    with pytest.raises(TypeError, match="backbone"):
        StrategyAdvisor(backbone="tiny")


def test_features_are_pooled_as_the_transformer_says(few_digits, make_transformer):
    X, y = few_digits
    transformer = make_transformer(pooling="avgmax")

    advisor = StrategyAdvisor(transformer, cv=3, random_state=0).fit(X, y)

    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))
    folds = RepeatedStratifiedKFold(n_splits=3, n_repeats=3, random_state=0)
    features = transformer.set_params(layer="block3").fit_transform(X)
    expected = cross_val_score(probe, features, y, cv=folds).mean()
    assert_allclose(advisor.layer_scores_["block3"], expected, rtol=1e-12)
    assert advisor.strategy_.estimator[0].pooling == "avgmax"


def test_a_layer_of_the_transformer_replaces_the_best_one(
    advisor, digits, make_transformer
):
    given = StrategyAdvisor(make_transformer(layer="stem"), random_state=0)

    given.fit(*digits)

    assert given.strategy_.estimator[0].layer == "stem"
    assert measurements(given) == measurements(advisor)


def test_seeds_fill_in_what_is_left_open(few_digits, make_transformer):
    settings = {"cv": 2, "random_state": 0}
    open_one = StrategyAdvisor(make_transformer(weights=None), **settings)
    seeded = StrategyAdvisor(make_transformer(weights=None, random_state=7), **settings)

    open_one.fit(*few_digits)
    seeded.fit(*few_digits)

    assert open_one.strategy_.estimator[0].random_state == 0
    assert seeded.strategy_.estimator[0].random_state == 7
    assert measurements(open_one) != measurements(seeded)


@pytest.mark.parametrize("random_state", [0, "generator"])
def test_a_seed_gives_the_same_advice(random_state, few_digits, make_transformer):
    advisors = []
    for global_seed in (0, 1):
        np.random.seed(global_seed)  # noqa: NPY002
        seed = np.random.RandomState(3) if random_state == "generator" else random_state
        advisor = StrategyAdvisor(make_transformer(), cv=2, random_state=seed)
        advisors.append(advisor.fit(*few_digits))

    first, second = advisors
    first.seconds_per_pass_ = second.seconds_per_pass_
    assert first.report() == second.report()
    assert measurements(first) == measurements(second)


def test_the_evaluation_takes_one_forward_pass(few_digits, make_transformer, n_forward):
    StrategyAdvisor(make_transformer(), cv=2, random_state=0).fit(*few_digits)

    assert sum(n_forward) == 60


def test_max_images_limits_the_evaluation(few_digits, make_transformer, n_forward):
    advisor = StrategyAdvisor(make_transformer(), cv=2, max_images=30, random_state=0)

    advisor.fit(*few_digits)

    assert sum(n_forward) == advisor.n_evaluated_
    assert abs(advisor.n_evaluated_ - 30) <= 2  # rounded by class
    assert advisor.n_images_ == 60


def test_rare_classes_keep_as_many_images_as_folds(few_digits, make_transformer):
    X, _ = few_digits
    y = np.array([0] * 50 + [1] * 5 + [2] * 5)

    advisor = StrategyAdvisor(make_transformer(), max_images=30, random_state=0)
    advisor.fit(X, y)

    assert (advisor.n_evaluated_, advisor.n_folds_) == (25 + 5 + 5, 5)


@pytest.fixture(scope="module")
def known_images():
    """Images of noise and their predicted categories."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(200, 40, 40, 3), dtype=np.uint8)
    means = np.linspace(0.2, 1, 200).reshape(-1, 1, 1, 1)
    tints = rng.uniform(0.2, 1, size=(200, 1, 1, 3))
    X = (noise * means * tints).astype(np.uint8)
    names = PretrainedCNNClassifier("tiny", image_size=40).fit(X).predict(X)
    frequent = [name for name in np.unique(names) if (names == name).sum() >= 12]
    chosen = np.isin(names, frequent)
    assert len(frequent) >= 2
    return X[chosen], names[chosen]


@pytest.mark.parametrize("kind", ["name", "WordNet ID"])
def test_known_categories_need_no_training(kind, known_images):
    X, y = known_images
    if kind == "WordNet ID":
        ids = {name: number for number, name in imagenet_names().items()}
        y = np.array([ids[name] for name in y])
    transformer = CNNFeatureTransformer("tiny", image_size=40)

    advisor = StrategyAdvisor(transformer, cv=2, max_images=60, random_state=0)
    advisor.fit(X, y)

    assert advisor.as_is_score_ == 1  # the labels are its own predictions
    assert advisor.similarity_ == "contained"
    assert advisor.strategy_.name == "as_is"
    assert set(advisor.class_map_) == set(y)
    assert clone(advisor.strategy_.estimator).fit(X).score(X, y) == 1
    assert "among the categories" in advisor.report()
    assert "by number of training images" not in advisor.report()


def test_a_file_with_another_head_has_other_categories(tmp_path):
    model = get_model("squeezenet1_1", weights=None, num_classes=7)
    path = tmp_path / "seven.safetensors"
    save_file(model.state_dict(), path)
    X = np.random.default_rng(0).integers(256, size=(8, 64, 64, 3), dtype=np.uint8)
    transformer = CNNFeatureTransformer("squeezenet1_1", weights=path, image_size=64)

    advisor = StrategyAdvisor(transformer, cv=2).fit(X, ["tabby", "beagle"] * 4)

    assert advisor.as_is_score_ is None
    assert advisor.similarity_ != "contained"


def test_a_failed_fit_keeps_the_last_one(advisor, digits, make_transformer):
    X, _ = digits
    expected = advisor.report()
    again = copy.copy(advisor)
    again.set_params(transformer=make_transformer(image_shape=(4, 8)))

    with pytest.raises(ValueError, match="single image"):
        again.fit(X[:5, :32], [0, 0, 0, 0, 1])

    assert again.report() == expected
    assert again.n_features_in_ == 64


def test_one_layer_has_no_earlier_one(few_digits):
    blocks = {"only": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())}
    backbone = Backbone.from_blocks("one", blocks, preprocessing=Preprocessing(16))
    transformer = CNNFeatureTransformer(backbone, image_shape=(8, 8))

    advisor = StrategyAdvisor(transformer, cv=2).fit(*few_digits)

    assert advisor.lead_ == (0.0, 0.0)
    assert advisor.similarity_ == "similar"
    assert "earlier layer" not in advisor.report()
    assert "Similar images are assumed" in advisor.report()


@pytest.mark.parametrize("ending", ["adaptive pooling", "fixed size"])
def test_feature_maps_are_recognized_by_their_shape(ending, few_digits):
    """After adaptive pooling, or for one image size only, there is no stride."""
    blocks = {
        "stem": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()),
        "top": nn.Sequential(nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)),
    }
    if ending == "fixed size":
        blocks["top"] = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 7 * 7, 18), nn.Unflatten(1, (2, 3, 3))
        )
    backbone = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    transformer = CNNFeatureTransformer(backbone, image_shape=(8, 8))

    advisor = StrategyAdvisor(transformer, cv=2, random_state=0).fit(*few_digits)

    assert list(advisor.layer_scores_) == ["stem", "top"]
    early = recommend_strategy(300, 5, "different", transformer=transformer)
    assert early.estimator[0].layer == "top"  # two thirds of two


def test_the_engine_is_that_of_the_transformer(
    few_digits, make_transformer, monkeypatch
):
    transformer = make_transformer(engine="openvino")
    monkeypatch.setattr("skltl.inference._openvino.find_spec", lambda name: None)

    with pytest.raises(EngineError, match="engine='openvino' cannot run"):
        StrategyAdvisor(transformer).fit(*few_digits)


@pytest.mark.parametrize("scope", ["global", "transformer"])
def test_pandas_output_of_the_transformer_is_kept(scope, few_digits, make_transformer):
    X, y = few_digits
    transformer = make_transformer()
    if scope == "transformer":
        transformer.set_output(transform="pandas")

    with config_context(transform_output="pandas" if scope == "global" else "default"):
        advisor = StrategyAdvisor(transformer, cv=2, random_state=0).fit(X, y)
        recommended = clone(advisor.strategy_.estimator[0]).fit(X)
        for fitted in (advisor.transformer_, recommended):
            names = fitted.get_feature_names_out().tolist()
            assert fitted.transform(X[:2]).columns.tolist() == names


def test_images_of_weight_0_are_not_evaluated(few_digits, make_transformer):
    X, y = few_digits
    weights = np.ones(len(y))
    weights[::4] = 0
    is_evaluated = weights > 0

    weighted = StrategyAdvisor(make_transformer(), cv=2, random_state=0)
    weighted.fit(X, y, weights)

    part = clone(weighted).fit(X[is_evaluated], y[is_evaluated])
    assert weighted.report() == part.report()
    assert measurements(weighted) == measurements(part)


def test_accuracies_are_weighted(few_digits, make_transformer):
    """For equal images with different labels, the heavier label is predicted."""
    y = np.array([0, 1] * 15)
    X = np.tile(few_digits[0][:1], (30, 1))

    advisor = StrategyAdvisor(make_transformer(), random_state=0)
    advisor.fit(X, y, np.where(y == 0, 3.0, 1.0))

    assert_allclose(list(advisor.layer_scores_.values()), 0.75, atol=1e-9)


def test_groups_are_in_one_fold(few_digits, make_transformer):
    """Random labels can only be predicted from a copy of the same image."""
    X = np.repeat(few_digits[0][:40], 2, axis=0)
    y = np.repeat(np.random.default_rng(0).integers(2, size=40), 2)
    groups = np.repeat(np.arange(40), 2)
    advisor = StrategyAdvisor(make_transformer(), random_state=0)

    leaking = clone(advisor).fit(X, y)
    grouped = clone(advisor).fit(X, y, groups=groups)

    assert max(leaking.layer_scores_.values()) > 0.9
    assert max(grouped.layer_scores_.values()) < 0.75


def test_data_that_cannot_be_evaluated_are_refused(few_digits, make_transformer):
    X, y = few_digits
    advisor = StrategyAdvisor(make_transformer())

    with pytest.raises(ValueError, match="one class only"):
        advisor.fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="The class 7 has a single image"):
        advisor.fit(X[:4], [5, 5, 5, 7])
    with pytest.raises(ValueError, match="class 0 has a single group of images"):
        advisor.fit(X, y, groups=y)
    with pytest.raises(ValueError, match="single layer"):
        StrategyAdvisor(make_transformer(layer=["stem", "block1"])).fit(X, y)
    with pytest.raises(NotFittedError):
        StrategyAdvisor(make_transformer()).report()


def test_the_report_contains_the_measurements(advisor, digits):
    report = advisor.report()

    smallest = np.bincount(digits[1]).min()
    assert f"100 images in 10 classes, {smallest} in the smallest" in report
    assert "100 images, 5-fold cross-validation repeated 3 times" in report
    for layer, score in advisor.layer_scores_.items():
        mark = "  best" if layer == advisor.best_layer_ else ""
        error = advisor.layer_errors_[layer]
        assert f"    {layer:<12} {score:.3f} ({error:.3f}){mark}\n" in report
    for size, score in advisor.size_scores_.items():
        assert f"{size:<12} {score:.3f} ({advisor.size_errors_[size]:.3f})" in report
    assert "Strategy: extract_early" in report
    assert report.endswith(advisor.strategy_.script)
    assert max(map(len, report.splitlines()[:-2])) <= 80


def with_attributes(advisor, **attributes):
    """Return a copy of a fitted advisor with other measurements."""
    copied = copy.copy(advisor)
    vars(copied).update(attributes)
    return copied


@pytest.mark.parametrize(
    ("scores", "gain", "outlook"),
    [
        ([0.6, 0.7, 0.8], (0.1, 0.02), "would improve"),
        ([0.7, 0.967, 1.0], (0.033, 0.01), "would change little"),
        ([0.7, 0.967, 0.995], (0.028, 0.01), "would change little"),
        ([0.7, 0.701, 0.702], (0.001, 0.01), "would change little"),
        ([0.6, 0.7, 0.72], (0.02, 0.03), "is open"),
    ],
)
def test_more_images_pay_only_where_accuracy_can_rise(advisor, scores, gain, outlook):
    sizes = dict(zip([20, 40, 80], scores, strict=True))
    errors = dict.fromkeys(sizes, 0.01)

    report = with_attributes(
        advisor, size_scores_=sizes, size_errors_=errors, gain_=gain
    ).report()

    (line,) = [line for line in report.splitlines() if "more images" in line]
    assert outlook in line


@pytest.mark.parametrize(
    ("lead", "is_open"),
    [
        ((0.1, 0.03), False),
        ((0.03, 0.03), True),
        ((-0.01, 0.03), True),
        ((-0.05, 0.03), False),
    ],
)
def test_chance_is_mentioned_within_the_standard_error(advisor, lead, is_open):
    report = with_attributes(advisor, lead_=lead).report()

    assert ("due to chance" in report) == is_open


def test_notebooks_show_the_report_unless_scikit_learn_shows_text(advisor):
    unfitted = StrategyAdvisor(CNNFeatureTransformer("tiny"))

    assert advisor._repr_html_().startswith("<pre>100 images in 10 classes")
    bundle = advisor._repr_mimebundle_()
    assert "<pre>100 images" in bundle["text/html"]
    assert bundle["text/plain"] == advisor.report()
    assert "StrategyAdvisor" in unfitted._repr_html_()
    assert "StrategyAdvisor" in unfitted._repr_mimebundle_()["text/html"]
    with config_context(display="text"):
        for either in (advisor, unfitted):
            assert not hasattr(either, "_repr_html_")
            assert either._repr_mimebundle_() == {"text/plain": repr(either)}


def test_a_saved_advisor_has_the_same_report(advisor, digits):
    loaded = pickle.loads(pickle.dumps(advisor))

    assert loaded.report() == advisor.report()
    X = digits[0][:3]
    assert_array_equal(
        loaded.transformer_.transform(X), advisor.transformer_.transform(X)
    )


def test_verbose_shows_a_progress_bar_for_each_layer(few_digits, capsys):
    transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    StrategyAdvisor(transformer, random_state=0).fit(*few_digits)
    assert capsys.readouterr().err == ""

    advisor = StrategyAdvisor(transformer, random_state=0, verbose=1).fit(*few_digits)

    shown = capsys.readouterr().err
    assert all(f"tiny {layer}: 100%" in shown for layer in advisor.layer_scores_)
    assert all(f"{size} images: 100%" in shown for size in [*advisor.size_scores_][:2])
