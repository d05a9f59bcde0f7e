"""Displays of strategies and of the gains of transfer show what was measured."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    StrategyAdvisor,
    StrategyDisplay,
    TransferClassifier,
    TransferGainDisplay,
    recommend_strategy,
)

ROWS = {"image_shape": (8, 8), "image_size": 32}
TINY = CNNFeatureTransformer("tiny", **ROWS)

CORNERS = {
    "extract_early": (0, 0),
    "extract": (1, 0),
    "finetune_top": (0, 1),
    "scratch": (0, 1),
    "finetune": (1, 1),
}


@pytest.mark.parametrize(
    ("strategy", "n_images", "lead"),
    [
        ("extract_early", 100, 0.01),
        ("extract", 100, -0.05),
        ("finetune_top", 50_000, 0.05),
        ("finetune", 50_000, 0.0),
    ],
)
def test_the_box_of_the_strategy_is_highlighted(strategy, n_images, lead):
    display = StrategyDisplay(n_images, 10, lead, strategy).plot()

    bold = [text for text in display.ax_.texts if text.get_weight() == "bold"]
    assert len(bold) == 1
    assert np.floor(bold[0].get_position()).tolist() == list(CORNERS[strategy])


def test_the_point_is_in_the_box_of_the_rules():
    for n_images in (2, 600, 999, 1000, 1001, 99_999, 10**6):
        for n_smallest in (None, 1, 49, 50, 600):
            for lead in (-1.0, -0.05, 0.0, 0.00999, 0.01, 0.011, 0.5):
                similarity = "different" if lead >= 0.01 else "similar"
                name = recommend_strategy(
                    n_images, 2, similarity, transformer=TINY, n_smallest=n_smallest
                ).name

                right, up = StrategyDisplay(
                    n_images, 2, lead, name, n_smallest
                ).coordinates_

                assert (int(right), int(up)) == CORNERS[name]
                assert 0 < right < 2
                assert 0 < up < 2


def test_the_data_set_of_an_advisor_is_small_if_a_class_is():
    """2,000 images with 10 in one class."""
    rows, _ = load_digits(return_X_y=True)
    X = np.concatenate([rows, rows[:203]]) / 16
    y = np.arange(2000) % 200 == 0
    classifier = TransferClassifier(TINY, cv=2, random_state=0)
    classifier.advisor_ = StrategyAdvisor(TINY, max_images=30, cv=2, random_state=0)
    advisor = classifier.advisor_.fit(X, y)

    display = StrategyDisplay.from_advisor(classifier)

    assert advisor.n_smallest_ == display.n_smallest == 10
    assert display.lead == advisor.lead_[0]
    right, up = display.coordinates_
    assert (int(right), int(up)) == CORNERS[advisor.strategy_.name]
    assert int(up) == 0
    point = display.ax_.get_lines()[0]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == display.coordinates_
    assert "2,000 images, 2 classes" in {t.get_text() for t in display.ax_.texts}


def test_gains_are_differences_of_start_slope_and_asymptote():
    steps = np.arange(1, 6)
    transfer, scratch = [0.5, 0.7, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5]

    display = TransferGainDisplay((steps, steps), (transfer, scratch)).plot()

    # 0.9 of the rise to 0.9 is reached at the third step, of that to 0.5 at the fifth.
    assert_allclose(display.gains_["start"], 0.4)
    assert_allclose(display.gains_["slope"], 0.4 / 2 - 0.4 / 4)
    assert_allclose(display.gains_["asymptote"], 0.4)
    lines = display.ax_.get_lines()
    assert_array_equal(lines[0].get_ydata(), transfer)
    assert_array_equal(lines[1].get_ydata(), scratch)
    assert "asymptote +0.4" in display.ax_.get_title()


def test_negative_scores_are_visible():
    steps, transfer, scratch = np.arange(1, 4), [0.2, 0.8, 0.9], [-3, -0.9, -0.5]

    display = TransferGainDisplay((steps, steps), (transfer, scratch)).plot()

    assert display.ax_.get_ylim()[0] < -3
    # 0.9 of the rise from -3 to -0.5 is reached at the third step.
    assert_allclose(display.gains_["slope"], 0.7 / 2 - 2.5 / 2)


def test_fitted_classifiers_are_compared_by_epoch():
    rows, labels = load_digits(return_X_y=True)
    settings = {"layer": "block2", "head_init": "random", "head_epochs": 0}
    settings |= {"finetune_epochs": 2, "validation_fraction": 0.3, "random_state": 0}
    both = [
        FineTunedCNNClassifier("tiny", weights=weights, **settings, **ROWS).fit(
            rows[:60] / 16, labels[:60] % 3
        )
        for weights in ("pretrained", None)
    ]

    display = TransferGainDisplay.from_estimators(*both)

    for line, fitted in zip(display.ax_.get_lines(), both, strict=True):
        expected = [epoch["validation_score"] for epoch in fitted.history_]
        assert_array_equal(line.get_ydata(), expected)
    assert display.ax_.get_xlabel() == "epoch"


def test_any_classifiers_are_compared_by_number_of_images():
    rows, labels = load_digits(return_X_y=True)

    display = TransferGainDisplay.from_estimators(
        LogisticRegression(max_iter=500), KNeighborsClassifier(), rows[:300],
        labels[:300], sizes=[0.5, 1.0],
    )  # fmt: skip

    assert display.ax_.get_xlabel() == "number of training images"
    assert display.steps[0].tolist() == [100, 200]
    assert all((scores > 0.5).all() for scores in display.scores)


def test_a_classifier_has_no_gain_over_itself():
    rows, labels = load_digits(return_X_y=True)
    neighbors = KNeighborsClassifier()

    display = TransferGainDisplay.from_estimators(
        neighbors, neighbors, rows[:300], labels[:300]
    )

    assert set(display.gains_.values()) == {0.0}


def test_unfitted_estimators_cannot_be_plotted():
    with pytest.raises(Exception, match="not fitted"):
        StrategyDisplay.from_advisor(StrategyAdvisor(TINY))
    with pytest.raises(ValueError, match="TransferClassifier; got Standard"):
        StrategyDisplay.from_advisor(StandardScaler().fit(np.eye(2)))
    with pytest.raises(Exception, match="not fitted"):
        TransferGainDisplay.from_estimators(
            FineTunedCNNClassifier("tiny"), FineTunedCNNClassifier("tiny")
        )


def test_a_given_strategy_has_no_place_in_the_diagram():
    rows, labels = load_digits(return_X_y=True)
    classifier = TransferClassifier(TINY, strategy="extract")
    classifier.fit(rows[:20] / 16, labels[:20] % 2)

    with pytest.raises(ValueError, match="has no advisor"):
        StrategyDisplay.from_advisor(classifier)


@pytest.mark.parametrize("n_images", [2, 999, 1000, 10**6])
def test_the_text_of_the_point_is_in_its_box(n_images):
    display = StrategyDisplay(n_images, 10, 0.0, "extract").plot()

    display.figure_.canvas.draw()
    extent = display.ax_.texts[-1].get_window_extent()
    (_, low), (_, high) = display.ax_.transData.inverted().transform(extent)
    box = int(display.coordinates_[1])
    assert box <= low < high <= box + 1
