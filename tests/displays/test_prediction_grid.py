"""The prediction grid shows the worst errors, in order, as the estimator read them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skltl import (
    FineTunedCNNClassifier,
    PredictionGridDisplay,
    PretrainedCNNClassifier,
    make_feature_pipeline,
)

ROWS = {"image_shape": (8, 8), "image_size": 16}


def tiny_pipeline(kind):
    return make_feature_pipeline("tiny", kind, layer="block2", random_state=0, **ROWS)


@pytest.fixture(scope="module")
def fitted(digits):
    """A pipeline fitted on 40 digits, and 100 others."""
    rows, labels = digits
    pipeline = tiny_pipeline("softmax").fit(rows[:40], labels[:40])
    return pipeline, rows[100:200], labels[100:200]


def test_worst_errors_come_first(fitted):
    pipeline, X, y = fitted
    proba = pipeline.predict_proba(X)
    of_true = proba[np.arange(100), y]
    proba[np.arange(100), y] = -1
    margins = of_true - proba.max(axis=1)

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=7)

    worst = np.argsort(margins, kind="stable")[:7]
    assert_array_equal(display.y_true, y[worst])
    assert_array_equal(display.y_pred, pipeline.predict(X)[worst])
    assert_allclose(display.margins, margins[worst])
    assert display.n_wrong_ == 7
    for ax, im, index in zip(display.axes_, display.ims_, worst, strict=True):
        assert ax.get_images() == [im]
        assert_allclose(im.get_array()[:, :, 0], X[index].reshape(8, 8))
        assert ax.get_title() == f"{pipeline.predict(X)[index]}\n(is {y[index]})"
        assert ax.title.get_color() == "firebrick"


@pytest.mark.parametrize(("n_classes", "kind"), [(2, "svm"), (3, "svm"), (2, "ovr")])
def test_margins_are_differences_of_scores(n_classes, kind, digits):
    """The decision value of two classes is that difference already."""
    rows, labels = digits
    chosen = np.flatnonzero(labels < n_classes)[:60]
    X, y = rows[chosen], np.array(["rose", "iris", "lily"])[labels[chosen]]
    pipeline = tiny_pipeline(kind).fit(X[:20], y[:20])
    if kind == "ovr":
        scores = pipeline.predict_proba(X)
    else:
        scores = pipeline.decision_function(X)
        if n_classes == 2:
            scores = np.stack([0 * scores, scores], axis=1)
    expected = []
    for row, label in zip(scores, y, strict=True):
        by_class = dict(zip(pipeline.classes_, row, strict=True))
        of_true = by_class.pop(label)
        expected.append(of_true - max(by_class.values()))

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=9)

    assert_allclose(display.margins, np.sort(expected)[:9], rtol=1e-6, atol=1e-9)
    is_wrong = display.y_true != display.y_pred
    assert_array_equal(is_wrong, display.margins < 0)


ESTIMATORS = {
    "pipeline": lambda: tiny_pipeline("softmax"),
    "search": lambda: GridSearchCV(tiny_pipeline("svm"), {"svm__C": [1]}, cv=2),
    "pretrained": lambda: PretrainedCNNClassifier("tiny", class_map="learn", **ROWS),
    "fine-tuned, in a pipeline": lambda: make_pipeline(
        FunctionTransformer(),
        FineTunedCNNClassifier(
            "tiny", layer="block1", head_epochs=1, finetune_epochs=0, **ROWS
        ),
    ),
}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_network_runs_once_on_each_image(kind, digits, network_counts):
    rows, labels = digits[0], digits[1] % 2
    estimator = ESTIMATORS[kind]().fit(rows[:20], labels[:20])
    X, y = rows[20:30], labels[20:30]
    expected = estimator.predict(X)
    network_counts.clear()

    display = PredictionGridDisplay.from_estimator(estimator, X, y, n_images=10)

    assert sum(network_counts) == 10
    assert_array_equal(np.sort(display.y_pred), np.sort(expected))
    assert display.n_wrong_ == (expected != y).sum()


def test_errors_come_first_with_any_decision_threshold(digits):
    rows, labels = (array[digits[1] < 2] for array in digits)
    pipeline = tiny_pipeline("softmax").fit(rows[:40], labels[:40])
    X, y = rows[40:100], labels[40:100]
    proba = pipeline.predict_proba(X)[:, 1]
    strict = FixedThresholdClassifier(pipeline, threshold=np.sort(proba)[-5])
    strict.fit(rows[:40], labels[:40])
    assert (strict.predict(X) != y).sum() > 8

    display = PredictionGridDisplay.from_estimator(strict, X, y, n_images=8)

    assert display.n_wrong_ == 8


def test_images_are_read_by_the_estimator_in_any_wrapper(fitted):
    pipeline, X, y = fitted
    wrapped = make_pipeline(FunctionTransformer(), pipeline)

    display = PredictionGridDisplay.from_estimator(
        wrapped, pd.DataFrame(X), y, n_images=2
    )

    expected = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=2)
    assert_array_equal(display.images, expected.images)


@pytest.mark.parametrize("container", [np.asarray, pd.DataFrame, np.ndarray.tolist])
def test_rows_of_any_table_are_reshaped_to_images(container, fitted):
    pipeline, X, y = fitted
    on_pixels = LogisticRegression().fit(X, y)

    for estimator, image_shape in ((pipeline, None), (on_pixels, (8, 8))):
        display = PredictionGridDisplay.from_estimator(
            estimator, container(X[:1]), y[:1], image_shape=image_shape
        )

        assert_allclose(display.images[0][..., 0], X[0].reshape(8, 8))


WRAPPERS = {
    "calibration": lambda fitted: CalibratedClassifierCV(FrozenEstimator(fitted)),
    "threshold": lambda fitted: FixedThresholdClassifier(fitted, threshold=0.3),
    "vote": lambda fitted: VotingClassifier([("first", fitted)], voting="soft"),
    "union": lambda fitted: make_pipeline(
        FeatureUnion([("feat", fitted[0])]), LogisticRegression()
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_image_shape_is_found_in_any_wrapper(kind, digits):
    rows, labels = digits[0], digits[1] % 2
    pipeline = tiny_pipeline("softmax").fit(rows[:30], labels[:30])
    wrapped = WRAPPERS[kind](pipeline).fit(rows[:30], labels[:30])

    display = PredictionGridDisplay.from_estimator(wrapped, rows[30:31], labels[30:31])

    assert_allclose(display.images[0][..., 0], rows[30].reshape(8, 8))


def test_rows_have_the_shape_of_the_fit(digits):
    pipeline = tiny_pipeline("softmax").fit(digits[0][:30], digits[1][:30])
    pipeline.set_params(feat__image_shape=None)  # for the next fit

    display = PredictionGridDisplay.from_estimator(
        pipeline, digits[0][30:31], digits[1][30:31]
    )

    assert_allclose(display.images[0][..., 0], digits[0][30].reshape(8, 8))


def test_arguments_are_checked(fitted):
    pipeline, X, y = fitted
    from_estimator = PredictionGridDisplay.from_estimator

    with pytest.raises(ValueError, match="^10 is"):
        from_estimator(pipeline, X, y + 1)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        from_estimator(pipeline, X, y[:5])
    with pytest.raises(ValueError, match="n_images=0"):
        from_estimator(pipeline, X, y, n_images=0)
    with pytest.raises(ValueError, match="^'xxx") as error:
        from_estimator(pipeline, X, ["x" * 10_000] * 100)
    assert len(str(error.value)) < 300
    with pytest.raises(NotFittedError):
        from_estimator(tiny_pipeline("svm"), X, y)


@pytest.mark.parametrize("last", [Ridge(), KMeans(2)], ids=["regressor", "clusterer"])
def test_estimators_that_are_no_classifiers_are_refused(last, digits):
    X, y = (array[:20] for array in digits)
    estimator = tiny_pipeline(last).fit(X, y)

    with pytest.raises(ValueError, match=f"classifier .*; got {type(last).__name__}"):
        PredictionGridDisplay.from_estimator(estimator, X, y)


def test_display_accepts_axes_and_keyword_arguments():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    display = PredictionGridDisplay([image, image], ["a", "b"], ["a", "a"], [1, -1])
    _, axes = plt.subplots(2, 1)

    display.plot(axes=axes, interpolation="bilinear")

    assert display.axes_.tolist() == axes.tolist()
    assert display.figure_ is axes[0].figure
    assert display.ims_[0].get_interpolation() == "bilinear"
    assert [ax.get_title() for ax in axes] == ["a", "a\n(is b)"]
    assert to_rgb(axes[0].title.get_color()) == to_rgb("dimgray")
    with pytest.raises(ValueError, match="Expected axes to have 2 axes, got 1"):
        display.plot(axes=axes[0])
