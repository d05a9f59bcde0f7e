"""The prediction grid shows the worst errors, in order, as the estimator read them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    KFold,
    cross_val_predict,
)
from sklearn.neighbors import KNeighborsClassifier
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
        of_each = pipeline.predict_proba(X)[index]
        predicted = of_each.argmax()
        first, second = ax.get_title().split("\n")
        assert first == f"{predicted} {of_each[predicted]:.2f}"
        assert second == f"(is {y[index]} {of_each[y[index]]:.2f})"
        assert ax.get_xlabel() == str(index)
        assert ax.title.get_color() == "firebrick"
    n_wrong = (pipeline.predict(X) != y).sum()
    assert display.figure_.get_suptitle() == f"{n_wrong} of 100 wrong"
    assert display.indices.tolist() == worst.tolist()


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


def test_estimators_that_predict_no_targets_are_refused(digits):
    X, y = (array[:20] for array in digits)
    estimator = tiny_pipeline(KMeans(2)).fit(X, y)

    with pytest.raises(ValueError, match="classifier or a regressor; got KMeans"):
        PredictionGridDisplay.from_estimator(estimator, X, y)


def test_cross_validated_predictions_of_files_name_the_files(image_files):
    """Probabilities and labels of ``cross_val_predict`` give the same grid."""
    y = np.resize(["cup", "key", "pen"], 9)
    cv = {"cv": KFold(3, shuffle=True, random_state=0)}
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block1", image_size=16)
    labels = cross_val_predict(pipeline, image_files, y, **cv)
    proba = cross_val_predict(pipeline, image_files, y, method="predict_proba", **cv)
    rows, columns = np.arange(9), np.resize([0, 1, 2], 9)
    of_others = proba.copy()
    of_others[rows, columns] = -1
    margins = proba[rows, columns] - of_others.max(axis=1)
    from_predictions = PredictionGridDisplay.from_predictions

    for display in (
        from_predictions(y, proba, image_files, n_images=4),
        from_predictions(y, labels, image_files, proba=proba, n_images=4),
    ):
        worst = np.argsort(margins, kind="stable")[:4]
        assert display.indices.tolist() == worst.tolist()
        assert display.names == [str(image_files[index]) for index in worst]
        assert display.summary == f"{(labels != y).sum()} of 9 wrong"
        assert_allclose(display.margins, margins[worst])
        for ax, im, index in zip(display.axes_, display.ims_, worst, strict=True):
            assert_array_equal(im.get_array(), Image.open(image_files[index]))
            assert ax.get_xlabel() == f"{index} · image_{index}.png"
            expected = f"{labels[index]} {proba[index].max():.2f}"
            assert ax.get_title().split("\n")[0] == expected


def test_labels_alone_have_the_wrong_ones_first_in_their_order(images):
    y_true = np.array(list("abcabcabc"))
    y_pred = np.array(list("abaabbacc"))

    display = PredictionGridDisplay.from_predictions(y_true, y_pred, images)

    assert display.indices.tolist() == [2, 5, 7, 0, 1, 3, 4, 6, 8]
    assert display.axes_[0].get_title() == "a\n(is c)"
    assert np.isnan(display.margins).all()


def test_classes_name_the_columns_of_probabilities(images):
    y, proba = ["a", "b"] * 4 + ["a"], np.tile([0.1, 0.2, 0.7], (9, 1))
    from_predictions = PredictionGridDisplay.from_predictions

    display = from_predictions(y, proba, images, classes=["a", "b", "c"])

    assert set(display.y_pred) == {"c"}
    assert display.axes_[0].get_title() == "c 0.70\n(is a 0.10)"
    with pytest.raises(ValueError, match=r"\(9, 3\), but there are 2 .*`classes`"):
        from_predictions(y, proba, images)
    with pytest.raises(ValueError, match="must be in .0, 1.*predict_proba"):
        from_predictions(["a", "b", "c"] * 3, 10 * proba, images)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        from_predictions(["a", "b", "c"], proba[:3], images)


@pytest.mark.parametrize("last", ["softmax", "svm", KNeighborsClassifier(9)])
def test_worst_label_orders_multilabel_predictions(last, digits):
    rows, digit = digits
    y = np.column_stack([digit % 2 == 0, digit > 4, np.isin(digit, [0, 6, 8, 9])])
    pipeline = tiny_pipeline(last).fit(rows[:60], y[:60].astype(int))
    X = rows[60:100]
    y = pd.DataFrame(y[60:100].astype(int), columns=["even", "high", "loop"])
    if last == "svm":
        signed = pipeline.decision_function(X)
    elif last == "softmax":
        signed = 2 * pipeline.predict_proba(X) - 1
    else:
        signed = 2 * np.stack(pipeline.predict_proba(X), 1)[..., 1] - 1
    margins = np.min(signed * (2 * y.to_numpy() - 1), axis=1)
    predicted = pipeline.predict(X)
    n_wrong = (predicted != y.to_numpy()).any(axis=1).sum()

    display = PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=40)

    assert display.n_wrong_ == n_wrong
    assert display.summary == f"{n_wrong} of 40 wrong"
    assert_allclose(display.margins, np.sort(margins), atol=1e-6)
    for ax, index in zip(display.axes_, display.indices, strict=True):
        names = y.columns[predicted[index] > 0]
        assert ax.get_title().split("\n")[0] == (", ".join(names) or "no label")
    is_red = [ax.title.get_color() == "firebrick" for ax in display.axes_]
    assert is_red == [index < n_wrong for index in range(40)]


def test_fine_tuned_multilabel_network_predicts_its_own_labels(digits):
    rows, digit = digits
    y = np.column_stack([digit % 2 == 0, digit > 4]).astype(int)
    settings = {"layer": "block1", "head_epochs": 1, "finetune_epochs": 0, **ROWS}
    fitted = FineTunedCNNClassifier("tiny", random_state=0, **settings)
    fitted.fit(rows[:40], y[:40])

    display = PredictionGridDisplay.from_estimator(fitted, rows[40:60], y[40:60])

    assert_array_equal(display.y_pred, fitted.predict(rows[40:60])[display.indices])
    proba = fitted.predict_proba(rows[40:60])[display.indices]
    assert_allclose(display.proba, proba, rtol=1e-5)


def test_largest_errors_of_a_regressor_come_first(digits):
    X, y = digits[0][:60], digits[1][:60] / 7
    pipeline = tiny_pipeline(Ridge()).fit(X[:30], y[:30])
    predicted = pipeline.predict(X)
    worst = np.argsort(-np.abs(predicted - y), kind="stable")[:12]

    display = PredictionGridDisplay.from_estimator(pipeline, X, y)
    given = PredictionGridDisplay.from_predictions(y, predicted, X, image_shape=(8, 8))

    for one in (display, given):
        assert one.indices.tolist() == worst.tolist()
        assert_allclose(one.margins, -np.abs(predicted - y)[worst], atol=1e-6)
    index = worst[0]
    title = f"predicted {predicted[index]:.4g}\n(is {y[index]:.4g})"
    assert display.axes_[0].get_title() == title
    error = np.abs(predicted - y).mean()
    assert display.summary == f"mean absolute error {error:.3g}, 60 images"


def test_several_values_are_in_the_order_of_their_root_mean_squared_error(images):
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.normal(size=(2, 9, 3))
    errors = np.linalg.norm(y_true - y_pred, axis=1) / np.sqrt(3)

    display = PredictionGridDisplay.from_predictions(y_true, y_pred, images)

    assert display.targets == "values"
    assert display.indices.tolist() == np.argsort(-errors).tolist()
    assert_allclose(-display.margins, np.sort(errors)[::-1])
    worst = errors.argmax()
    predicted, true = (
        ", ".join(f"{value:.4g}" for value in one[worst]) for one in (y_pred, y_true)
    )
    first, second = display.axes_[0].get_title().split("\n")
    assert (first[:6], second[:9]) == (predicted[:6], f"(is {true[:5]}")
    error = np.sqrt(np.mean((y_true - y_pred) ** 2))
    assert display.summary == f"root mean squared error {error:.3g}, 9 images"


def test_targets_that_do_not_match_are_refused(images):
    with pytest.raises(ValueError, match=r"shape \(9, 2\), and the predictions \(9,\)"):
        PredictionGridDisplay.from_predictions(np.eye(9, 2), np.ones(9), images)
    with pytest.raises(ValueError, match="targets are int64, and the predictions <U1"):
        PredictionGridDisplay.from_predictions(
            [1, 2, 3] * 3, ["a", "b", "c"] * 3, images
        )


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


def test_classes_may_be_in_any_order(images):
    y = ["cat", "dog", "cat"]
    proba = np.array([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])
    from_predictions = PredictionGridDisplay.from_predictions

    display = from_predictions(y, proba, images[:3], classes=["dog", "cat"])

    assert display.n_wrong_ == 1
    assert display.y_pred[0] == "dog"
    assert_allclose(display.margins, [-0.8, 0.2, 0.4])
    assert display.axes_[0].get_title() == "dog 0.90\n(is cat 0.10)"
    with pytest.raises(ValueError, match="'cow' is none of the classes"):
        from_predictions(y, ["cow"] * 3, images[:3], proba=proba)


def test_several_values_are_cut_between_values(images):
    values = np.array([[182294.1, 36530.2, 107490.3, 159729.4]])
    display = PredictionGridDisplay.from_predictions(values, values + 1, images[:1])
    title = "182295, 36531, 107491, ...\n(is 182294, 36530, 107490, ...)"
    assert display.axes_[0].get_title() == title
