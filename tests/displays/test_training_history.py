"""The display shows the history of a fit, stage by stage."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skltl import (
    FineTunedCNNClassifier,
    TrainingHistoryDisplay,
    TransferGainDisplay,
    make_feature_pipeline,
)

ROWS = {"image_shape": (8, 8), "image_size": 16}


def classifier(**parameters):
    settings = {"layer": "block2", "unfreeze": 1, "random_state": 0, **ROWS}
    return FineTunedCNNClassifier("tiny", **settings | parameters)


@pytest.fixture(scope="module")
def fitted(digits):
    rows, labels = digits
    tuned = classifier(head_epochs=4, finetune_epochs=3, validation_fraction=0.2)
    return tuned.fit(rows[:60], labels[:60])


def test_lines_are_the_history(fitted):
    display = TrainingHistoryDisplay.from_estimator(fitted, learning_rates=True)

    panels = [
        ("loss", "validation_loss"),
        ("score", "validation_score"),
        ("head_lr", "backbone_lr"),
    ]
    for ax, keys in zip(display.axes_, panels, strict=True):
        assert ax.get_lines() == [display.lines_[key] for key in keys]
        for key in keys:
            expected = [epoch[key] for epoch in fitted.history_]
            assert_array_equal(display.lines_[key].get_ydata(), expected)
    assert display.stages_ == [("head", 4), ("fine-tuning", 3)]
    names = {text.get_text() for text in display.axes_[0].texts}
    assert names == {"head", "fine-tuning"}
    frozen = display.lines_["backbone_lr"].get_ydata()[:4]
    assert_array_equal(frozen, np.zeros(4))


def test_missing_keys_are_not_plotted(fitted):
    history = [
        {key: value for key, value in epoch.items() if "validation" not in key}
        for epoch in fitted.history_
    ]

    display = TrainingHistoryDisplay(history).plot()

    assert list(display.lines_) == ["loss", "score"]
    assert [len(ax.get_lines()) for ax in display.axes_] == [1, 1]


def test_display_accepts_axes_and_keyword_arguments(fitted):
    _, axes = plt.subplots(2)

    display = TrainingHistoryDisplay.from_estimator(fitted, axes=axes, c="red", lw=3)

    assert display.axes_.tolist() == axes.tolist()
    assert display.figure_ is axes[0].figure
    for line in display.lines_.values():
        assert to_rgb(line.get_color()) == to_rgb("red")
        assert line.get_linewidth() == 3
    with pytest.raises(ValueError, match="Expected axes to have 3 axes, got 2"):
        display.plot(learning_rates=True, axes=axes)


def test_single_epoch_is_visible():
    history = [{"stage": "head", "epoch": 1, "loss": 0.9, "score": 0.6}]

    display = TrainingHistoryDisplay(history).plot()

    display.figure_.canvas.draw()
    pixels = np.asarray(display.figure_.canvas.buffer_rgba())[..., :3]
    color = np.round(255 * np.array(to_rgb("C0")))
    assert (pixels == color).all(axis=-1).sum() > 20


def test_history_is_found_in_pipelines_and_searches(digits):
    X, y = digits[0][:20], digits[1][:20] % 2
    network = classifier(head_epochs=1, finetune_epochs=1)
    pipeline = make_pipeline(FunctionTransformer(), network).fit(X, y)
    search = GridSearchCV(network, {"unfreeze": [1]}, cv=2).fit(X, y)

    for wrapped, inner in [
        (pipeline, pipeline[-1]),
        (search, search.best_estimator_),
    ]:
        display = TrainingHistoryDisplay.from_estimator(wrapped)

        assert display.history == inner.history_


def test_estimators_without_a_history_are_refused(digits):
    pipeline = make_feature_pipeline("tiny", "softmax", **ROWS)
    pipeline.fit(digits[0][:20], digits[1][:20])
    converted = FineTunedCNNClassifier.from_pipeline(pipeline)

    with pytest.raises(ValueError, match="training history; got LogisticRegression"):
        TrainingHistoryDisplay.from_estimator(pipeline)
    with pytest.raises(ValueError, match="history.* is empty"):
        TrainingHistoryDisplay.from_estimator(converted)
    with pytest.raises(ValueError, match="history.* is empty"):
        TransferGainDisplay.from_estimators(converted, converted)
    with pytest.raises(NotFittedError):
        TrainingHistoryDisplay.from_estimator(classifier())


def test_asymptote_is_the_score_of_the_best_epoch(digits):
    """With such high learning rates, every epoch is worse than the initial network."""
    rows, labels = digits
    # Ten copies of one image per class: accuracies on any stratified part are equal.
    first = np.repeat([np.flatnonzero(labels == label)[0] for label in range(10)], 10)
    X, y = rows[first], labels[first]
    fitted = classifier(
        layer="block1", head_epochs=0, finetune_epochs=6, early_stopping=True,
        patience=3, validation_fraction=0.3, head_lr=0.5, backbone_lr=0.5,
        schedule="constant", precision="float32",
    ).fit(X, y)  # fmt: skip

    display = TransferGainDisplay.from_estimators(fitted, fitted)

    best = fitted.best_validation_score_
    assert fitted.history_[-1]["validation_score"] < best
    assert fitted.score(X, y) == pytest.approx(best)
    assert display.asymptotes == [best, best]
