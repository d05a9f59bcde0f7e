"""Displays of pictures show the right pictures, in the right order."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skltl import GradCAMDisplay, PredictionGridDisplay, make_feature_pipeline
from skltl.classifiers import class_activation


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

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_pictures=7)

    worst = np.argsort(margins, kind="stable")[:7]
    assert_array_equal(display.y_true, y[worst])
    assert_array_equal(display.y_pred, pipeline.predict(X)[worst])
    assert_allclose(display.margins, margins[worst])
    assert display.n_wrong == 7
    for ax, row in zip(display.axes_, X[worst], strict=True):
        assert_allclose(ax.get_images()[0].get_array()[:, :, 0], row.reshape(8, 8))
        assert "(is " in ax.get_title()


def test_decisions_serve_where_there_are_no_probabilities():
    pipeline, X, y = digits_pipeline("svm")

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_pictures=3)

    assert_array_equal(display.margins, np.sort(display.margins))
    assert len(display.axes_) == 3


def test_maps_lie_over_the_pictures():
    pipeline, X, _ = digits_pipeline("softmax")
    expected = class_activation(pipeline, X[:4])

    display = GradCAMDisplay.from_estimator(pipeline, X[:4], n_columns=2)

    assert_array_equal(display.labels, pipeline.predict(X[:4]))
    for ax, picture, seen, label in zip(
        display.axes_, expected.pictures, expected.maps, expected.labels, strict=True
    ):
        below, above = ax.get_images()
        assert_allclose(below.get_array(), picture)
        assert_allclose(above.get_array(), seen)
        assert ax.get_title() == str(label)


def test_pictures_are_read_as_the_estimator_reads_them():
    pipeline, X, y = digits_pipeline("softmax")
    table = pd.DataFrame(X)
    wrapped = make_pipeline(FunctionTransformer(), pipeline)

    of_array = PredictionGridDisplay.from_estimator(pipeline, X, y, n_pictures=2)
    of_table = PredictionGridDisplay.from_estimator(wrapped, table, y, n_pictures=2)

    for first, second in zip(of_array.pictures, of_table.pictures, strict=True):
        assert_array_equal(first, second)


def test_wrong_labels_and_numbers_are_refused():
    pipeline, X, y = digits_pipeline("softmax")

    with pytest.raises(ValueError, match="is none of the classes"):
        PredictionGridDisplay.from_estimator(pipeline, X, y + 1)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        PredictionGridDisplay.from_estimator(pipeline, X, y[:5])
    with pytest.raises(ValueError, match="n_pictures=0"):
        PredictionGridDisplay.from_estimator(pipeline, X, y, n_pictures=0)
    with pytest.raises(ValueError, match="0 columns"):
        GradCAMDisplay.from_estimator(pipeline, X[:2], n_columns=0)
