"""Displays of advice and of what transfer gains show what was measured."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from skltl import (
    FineTunedCNNClassifier,
    StrategyAdvisor,
    StrategyDisplay,
    TransferGainDisplay,
)

ROWS = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}


def test_a_data_set_lies_in_the_box_that_is_advised():
    boxes = {
        "extract_early": (100, 10, 0.01),
        "extract": (100, 10, -0.05),
        "finetune_top": (50_000, 10, 0.05),
        "finetune": (50_000, 10, 0.0),
    }
    corners = {"extract_early": (0, 0), "extract": (1, 0)}
    corners |= {"finetune_top": (0, 1), "finetune": (1, 1)}

    for strategy, (n_images, n_classes, lead) in boxes.items():
        display = StrategyDisplay(n_images, n_classes, lead, strategy).plot()

        right, up = display.place
        assert (int(right >= 1), int(up >= 1)) == corners[strategy]
        bold = [text for text in display.ax_.texts if text.get_weight() == "bold"]
        assert len(bold) == 1
        assert np.floor(bold[0].get_position()).tolist() == list(corners[strategy])


def test_an_advisors_data_are_drawn():
    rows, labels = load_digits(return_X_y=True)
    advisor = StrategyAdvisor("tiny", **ROWS).fit(rows[:100] / 16, labels[:100])

    display = StrategyDisplay.from_advisor(advisor)

    assert display.lead == advisor.lead_[0]
    assert "100 pictures of 10 classes" in {t.get_text() for t in display.ax_.texts}


def test_gains_are_differences_of_start_slope_and_asymptote():
    steps = np.arange(1, 6)
    transfer, scratch = [0.5, 0.7, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5]

    display = TransferGainDisplay((steps, steps), (transfer, scratch)).plot()

    # 0.9 of 0.9 is reached at the third step, 0.9 of 0.5 at the fifth.
    assert_allclose(display.gains["start"], 0.4)
    assert_allclose(display.gains["slope"], 0.4 / 2 - 0.4 / 4)
    assert_allclose(display.gains["asymptote"], 0.4)
    lines = display.ax_.get_lines()
    assert_array_equal(lines[0].get_ydata(), transfer)
    assert_array_equal(lines[1].get_ydata(), scratch)
    assert "asymptote +0.4" in display.ax_.get_title()


def test_histories_are_drawn_by_epoch():
    rows, labels = load_digits(return_X_y=True)
    settings = {"layer": "block2", "unfreeze": "all", "head_init": "random"}
    settings |= {"head_epochs": 0, "finetune_epochs": 4, "validation_fraction": 0.3}
    both = [
        FineTunedCNNClassifier("tiny", weights=weights, **settings, **ROWS).fit(
            rows[:120] / 16, labels[:120]
        )
        for weights in ("imagenet", None)
    ]

    display = TransferGainDisplay.from_estimators(*both)

    for line, fitted in zip(display.ax_.get_lines(), both, strict=True):
        expected = [record["validation_score"] for record in fitted.history_]
        assert_array_equal(line.get_ydata(), expected)
    assert display.ax_.get_xlabel() == "epoch"


def test_any_classifiers_are_drawn_by_number_of_pictures():
    rows, labels = load_digits(return_X_y=True)

    display = TransferGainDisplay.from_estimators(
        LogisticRegression(max_iter=500), KNeighborsClassifier(), rows[:300],
        labels[:300], sizes=[0.5, 1.0],
    )  # fmt: skip

    assert display.ax_.get_xlabel() == "number of training pictures"
    assert display.steps[0].tolist() == [100, 200]
    assert all((scores > 0.5).all() for scores in display.scores)


def test_what_is_not_fitted_is_not_drawn():
    with pytest.raises(Exception, match="not fitted"):
        StrategyDisplay.from_advisor(StrategyAdvisor("tiny"))
    with pytest.raises(Exception, match="not fitted"):
        TransferGainDisplay.from_estimators(
            FineTunedCNNClassifier("tiny"), FineTunedCNNClassifier("tiny")
        )


def test_the_same_classifier_gains_nothing_over_itself():
    rows, labels = load_digits(return_X_y=True)
    neighbours = KNeighborsClassifier()

    display = TransferGainDisplay.from_estimators(
        neighbours, neighbours, rows[:300], labels[:300]
    )

    assert set(display.gains.values()) == {0.0}
