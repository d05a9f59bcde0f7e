"""Displays of images show the right images, in the right order."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skltl import GradCAMDisplay, PredictionGridDisplay, make_feature_pipeline
from collections import namedtuple

from skltl.displays._grad_cam import grad_cam

Activation = namedtuple("Activation", "images maps labels scores")


def class_activation(*args):
    return Activation(*grad_cam(*args))


def digits_pipeline(kind):
    rows, labels = load_digits(return_X_y=True)
    pipeline = make_feature_pipeline(
        "tiny", kind, layer="block2", image_shape=(8, 8), image_size=32
    )
    return (
        pipeline.fit(rows[:60] / 16, labels[:60]),
        rows[100:400] / 16,
        labels[100:400],
    )


def test_the_worst_mistakes_come_first():
    pipeline, X, y = digits_pipeline("softmax")
    proba = pipeline.predict_proba(X)
    of_true = proba[np.arange(300), y]
    proba[np.arange(300), y] = -1
    margins = of_true - proba.max(axis=1)

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=7)

    worst = np.argsort(margins, kind="stable")[:7]
    assert_array_equal(display.y_true, y[worst])
    assert_array_equal(display.y_pred, pipeline.predict(X)[worst])
    assert_allclose(display.margins, margins[worst])
    assert display.n_wrong_ == 7
    for ax, row in zip(display.axes_, X[worst], strict=True):
        assert_allclose(ax.get_images()[0].get_array()[:, :, 0], row.reshape(8, 8))
        assert "(is " in ax.get_title()


def test_decisions_serve_where_there_are_no_probabilities():
    pipeline, X, y = digits_pipeline("svm")

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=3)

    assert_array_equal(display.margins, np.sort(display.margins))
    assert len(display.axes_) == 3


def test_maps_lie_over_the_images():
    pipeline, X, _ = digits_pipeline("softmax")
    expected = class_activation(pipeline, X[:4])

    display = GradCAMDisplay.from_estimator(pipeline, X[:4], n_columns=2)

    assert_array_equal(display.labels, pipeline.predict(X[:4]))
    for ax, image, seen, label in zip(
        display.axes_, expected.images, expected.maps, expected.labels, strict=True
    ):
        below, above = ax.get_images()
        assert_allclose(below.get_array(), image)
        assert_allclose(above.get_array(), seen)
        assert ax.get_title() == str(label)


def test_images_are_read_as_the_estimator_reads_them():
    pipeline, X, y = digits_pipeline("softmax")
    table = pd.DataFrame(X)
    wrapped = make_pipeline(FunctionTransformer(), pipeline)

    of_array = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=2)
    of_table = PredictionGridDisplay.from_estimator(wrapped, table, y, n_images=2)

    for first, second in zip(of_array.images, of_table.images, strict=True):
        assert_array_equal(first, second)


def test_wrong_labels_and_numbers_are_refused():
    pipeline, X, y = digits_pipeline("softmax")

    with pytest.raises(ValueError, match="is none of the classes"):
        PredictionGridDisplay.from_estimator(pipeline, X, y + 1)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        PredictionGridDisplay.from_estimator(pipeline, X, y[:5])
    with pytest.raises(ValueError, match="n_images=0"):
        PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=0)
    with pytest.raises(ValueError, match="n_columns=0 must be at least 1"):
        GradCAMDisplay.from_estimator(pipeline, X[:2], n_columns=0)


@pytest.mark.parametrize("kind", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_margins_are_differences_between_two_classes(n_classes, kind):
    """Of two classes, the decision is that difference already."""
    rows, labels = load_digits(return_X_y=True)
    some = labels < n_classes
    X, y = rows[some][:80] / 16, np.array(["rose", "iris", "lily"])[labels[some][:80]]
    pipeline = make_feature_pipeline("tiny", kind, image_shape=(8, 8), random_state=0)
    pipeline.fit(X[:20], y[:20])
    if kind == "svm":
        scores = pipeline.decision_function(X)
        if n_classes == 2:
            scores = np.stack([0 * scores, scores], axis=1)
    else:
        scores = pipeline.predict_proba(X)
    expected = []
    for row, label in zip(scores, y, strict=True):
        of_class = dict(zip(pipeline.classes_, row, strict=True))
        of_true = of_class.pop(label)
        expected.append(of_true - max(of_class.values()))

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=10)

    assert_allclose(display.margins, np.sort(expected)[:10], rtol=1e-6, atol=1e-9)
    if kind == "svm":
        is_wrong = display.y_true != display.y_pred
        assert_array_equal(is_wrong, display.margins < 0)


def test_what_is_no_classifier_is_refused():
    rows, labels = load_digits(return_X_y=True)
    X, y = rows[:20] / 16, labels[:20]
    regressor = make_feature_pipeline("tiny", Ridge(), image_shape=(8, 8)).fit(X, y)
    clusters = make_feature_pipeline("tiny", KMeans(2), image_shape=(8, 8)).fit(X)

    for estimator, name in ((regressor, "Ridge"), (clusters, "KMeans")):
        with pytest.raises(ValueError, match=f"needs a classifier .*; got {name}"):
            PredictionGridDisplay.from_estimator(estimator, X, y)
    with pytest.raises(NotFittedError):
        PredictionGridDisplay.from_estimator(make_feature_pipeline("tiny"), X, y)


def test_unknown_labels_are_printed_plainly_and_in_short():
    rows, labels = load_digits(return_X_y=True)
    X, y = rows[:30] / 16, np.array(["iris", "lily"])[labels[:30] % 2]
    pipeline = make_feature_pipeline("tiny", "softmax", image_shape=(8, 8)).fit(X, y)

    with pytest.raises(ValueError, match="^'rose' is none of the classes") as error:
        PredictionGridDisplay.from_estimator(
            pipeline, X, np.where(y == "iris", "rose", y)
        )
    with pytest.raises(ValueError, match="is none of the classes") as long_error:
        GradCAMDisplay.from_estimator(pipeline, X[:2], ["x" * 10_000] * 2)
    assert max(len(str(one.value)) for one in (error, long_error)) < 300


def test_mistakes_come_first_whatever_threshold_a_classifier_has():
    rows, labels = load_digits(n_class=2, return_X_y=True)
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block2", image_shape=(8, 8), image_size=32
    ).fit(rows[:40] / 16, labels[:40])
    proba = pipeline.predict_proba(rows[40:] / 16)[:, 1]
    strict = FixedThresholdClassifier(pipeline, threshold=np.sort(proba)[-5])
    strict.fit(rows[:40] / 16, labels[:40])
    n_wrong = (strict.predict(rows[40:] / 16) != labels[40:]).sum()

    display = PredictionGridDisplay.from_estimator(
        strict, rows[40:] / 16, labels[40:], n_images=12
    )

    assert n_wrong > 12
    assert display.n_wrong_ == 12


@pytest.mark.parametrize(
    "name", ["$10-$20", r"a$\b_$", "soft-coated wheaten terrier" * 2]
)
def test_any_label_is_a_title_that_fits(name):
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    grid = PredictionGridDisplay(images, [name] * 6, [name, "a"] * 3, [0.1] * 6)
    maps = GradCAMDisplay(images, np.ones((6, 8, 8)), [name] * 6)

    for display in (grid.plot(), maps.plot()):
        display.figure_.canvas.draw()
        extents = [ax.title.get_window_extent() for ax in display.axes_]
        for left, right in pairwise(extents):
            assert left.x1 < right.x0
        assert extents[0].x0 >= 0
        if len(name) < 22:
            assert display.axes_[0].get_title() == name
