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
    recommend_strategy,
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


CORNERS = {"extract_early": (0, 0), "extract": (1, 0), "finetune": (1, 1)}
CORNERS |= {"finetune_top": (0, 1), "scratch": (0, 1)}


@pytest.mark.parametrize("lead", [-1.0, -0.05, 0.0, 0.00999, 0.01, 0.011, 0.5])
@pytest.mark.parametrize("n_smallest", [None, 1, 10, 49, 50, 51, 600])
@pytest.mark.parametrize("n_images", [2, 600, 999, 1000, 1001, 2000, 99_999, 10**6])
def test_the_point_is_in_the_box_of_the_rule(n_images, n_smallest, lead):
    similarity = "different" if lead >= 0.01 else "similar"
    strategy = recommend_strategy(
        n_images, 2, similarity, backbone="tiny", n_smallest=n_smallest
    )

    display = StrategyDisplay(n_images, 2, lead, strategy.name, n_smallest)

    right, up = display.place
    assert (int(right), int(up)) == CORNERS[strategy.name]
    assert 0 < right < 2
    assert 0 < up < 2


def test_the_smallest_class_places_an_advisors_data():
    """2,000 images of which one class has 10 are few."""
    rows, _ = load_digits(return_X_y=True)
    X = np.concatenate([rows, rows[:203]]) / 16
    y = np.arange(2000) % 200 == 0
    advisor = StrategyAdvisor("tiny", max_images=60, cv=2, **ROWS).fit(X, y)

    display = StrategyDisplay.from_advisor(advisor)

    assert advisor.n_smallest_ == display.n_smallest == 10
    right, up = display.place
    assert (int(right), int(up)) == CORNERS[advisor.strategy_.name]
    assert int(up) == 0
    point = display.ax_.get_lines()[0]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == display.place


def test_an_advisors_data_are_drawn():
    rows, labels = load_digits(return_X_y=True)
    advisor = StrategyAdvisor("tiny", **ROWS).fit(rows[:100] / 16, labels[:100])

    display = StrategyDisplay.from_advisor(advisor)

    assert display.lead == advisor.lead_[0]
    assert "100 images of 10 classes" in {t.get_text() for t in display.ax_.texts}


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


def test_any_classifiers_are_drawn_by_number_of_images():
    rows, labels = load_digits(return_X_y=True)

    display = TransferGainDisplay.from_estimators(
        LogisticRegression(max_iter=500), KNeighborsClassifier(), rows[:300],
        labels[:300], sizes=[0.5, 1.0],
    )  # fmt: skip

    assert display.ax_.get_xlabel() == "number of training images"
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


@pytest.mark.parametrize("n_images", [2, 300, 999, 1000, 20_000, 10**6])
def test_the_words_beside_the_point_stay_in_its_box(n_images):
    display = StrategyDisplay(n_images, 10, 0.0, "extract").plot()

    display.figure_.canvas.draw()
    words = display.ax_.texts[-1].get_window_extent()
    (_, low), (_, high) = display.ax_.transData.inverted().transform(words)
    box = int(display.place[1])
    assert box <= low < high <= box + 1
