"""The display shows the records of a fit, stage by stage."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from sklearn.datasets import load_digits
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
from skltl.finetuning._data import hold_out


@pytest.fixture(scope="module")
def fitted():
    rows, labels = load_digits(return_X_y=True)
    return FineTunedCNNClassifier(
        "tiny",
        layer="block2",
        image_shape=(8, 8),
        image_size=16,
        unfreeze=1,
        head_epochs=4,
        finetune_epochs=3,
        validation_fraction=0.2,
        random_state=0,
    ).fit(rows[:80] / 16, labels[:80])


def test_lines_are_the_records(fitted):
    display = TrainingHistoryDisplay.from_estimator(fitted, rates=True)

    keys = [
        ("loss", "validation_loss"),
        ("score", "validation_score"),
        ("head_lr", "backbone_lr"),
    ]
    for ax, names in zip(display.axes_, keys, strict=True):
        for line, name in zip(ax.get_lines(), names, strict=True):
            expected = [record[name] for record in fitted.history_]
            np.testing.assert_array_equal(line.get_ydata(), expected)
    assert display.stages_ == [("head", 4), ("fine-tuning", 3)]
    words = {text.get_text() for text in display.axes_[0].texts}
    assert words == {"head", "fine-tuning"}


def test_pretrained_layers_have_no_rate_while_they_are_frozen(fitted):
    rates = [record["backbone_lr"] for record in fitted.history_]

    assert rates[:4] == [0.0] * 4
    assert all(0 < rate <= 0.01 for rate in rates[4:])


def test_what_is_not_recorded_is_not_drawn(fitted):
    records = [
        {key: value for key, value in record.items() if "validation" not in key}
        for record in fitted.history_
    ]
    _, axes = plt.subplots(2)

    display = TrainingHistoryDisplay(records).plot(axes=axes)

    assert [len(ax.get_lines()) for ax in display.axes_] == [1, 1]
    assert display.axes_[0] is axes[0]


def test_what_has_no_history_is_refused():
    with pytest.raises(ValueError, match="no epoch"):
        TrainingHistoryDisplay([])
    with pytest.raises(NotFittedError):
        TrainingHistoryDisplay.from_estimator(FineTunedCNNClassifier("tiny"))


def test_the_history_is_found_inside_of_wrappers():
    rows, labels = load_digits(return_X_y=True)
    X, y = rows[:40] / 16, labels[:40]
    network = FineTunedCNNClassifier(
        "tiny", layer="block2", image_shape=(8, 8), image_size=16, unfreeze=1,
        head_epochs=1, finetune_epochs=1, random_state=0,
    )  # fmt: skip
    pipeline = make_pipeline(FunctionTransformer(), network).fit(X, y)
    search = GridSearchCV(network, {"unfreeze": [1]}, cv=2).fit(X, y)

    for wrapped, inner in (
        (pipeline, pipeline[-1]),
        (search, search.best_estimator_),
    ):
        display = TrainingHistoryDisplay.from_estimator(wrapped)

        assert display.history == inner.history_


def test_what_records_no_history_is_named():
    rows, labels = load_digits(return_X_y=True)
    pipeline = make_feature_pipeline("tiny", "softmax", image_shape=(8, 8))
    pipeline.fit(rows[:20] / 16, labels[:20])

    with pytest.raises(ValueError, match="training history; got LogisticRegression"):
        TrainingHistoryDisplay.from_estimator(pipeline)
    tuned = FineTunedCNNClassifier.from_pipeline(pipeline)
    with pytest.raises(ValueError, match="no epoch"):
        TrainingHistoryDisplay.from_estimator(tuned)
    with pytest.raises(ValueError, match="no epoch"):
        TransferGainDisplay.from_estimators(tuned, tuned)


def test_a_single_epoch_is_seen():
    records = [{"stage": "head", "epoch": 1, "loss": 0.9, "score": 0.6}]

    display = TrainingHistoryDisplay(records).plot()

    display.figure_.canvas.draw()
    pixels = np.asarray(display.figure_.canvas.buffer_rgba())[..., :3]
    colour = np.round(255 * np.array(to_rgb("C0")))
    assert (pixels == colour).all(axis=-1).sum() > 20


def test_the_asymptote_is_the_score_of_the_network_that_was_kept():
    """Rates so high that each epoch is worse than the network to begin with."""
    rows, labels = load_digits(return_X_y=True)
    X, y = rows[:150] / 16, labels[:150]
    fitted = FineTunedCNNClassifier(
        "tiny", layer="block1", image_shape=(8, 8), image_size=32, head_epochs=0,
        finetune_epochs=6, early_stopping=True, patience=3, validation_fraction=0.3,
        head_lr=0.5, backbone_lr=0.5, schedule="constant", random_state=0,
        precision="float32",
    ).fit(X, y)  # fmt: skip
    _, held_out = hold_out(y, None, 0.3, True, 0)

    display = TransferGainDisplay.from_estimators(fitted, fitted)

    expected = fitted.score(X[held_out], y[held_out])
    assert fitted.history_[-1]["validation_score"] < expected
    assert fitted.best_validation_score_ == pytest.approx(expected)
    assert display.asymptotes == [pytest.approx(expected)] * 2
