"""scikit-learn's callbacks, and progress bars, are told of stages and epochs."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from tiny_classifier import classifier, losses

callback = pytest.importorskip("sklearn.callback", reason="from scikit-learn 1.9 on")


class Diary:
    """Notes the tasks that end; stops a stage after so many epochs."""

    def __init__(self, n_epochs=99):
        self.n_epochs = n_epochs
        self.tasks = []
        self.predictions = []

    def setup(self, estimator, context):
        self.tasks.append("setup")

    def teardown(self, estimator, context):
        self.tasks.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, X, fitted_estimator):
        self.tasks.append(context.task_name)
        self.predictions.append(fitted_estimator.decision_function(X))
        return context.task_name == "epoch" and context.task_id + 1 >= self.n_epochs


def test_callbacks_see_each_epoch_and_an_estimator_that_predicts(digits):
    X, y = digits[0][:60], digits[1][:60]
    diary = Diary()

    fitted = classifier().set_callbacks(diary).fit(X, y)

    assert diary.tasks == [
        *("setup", *["epoch"] * 3, "head", *["epoch"] * 2, "fine-tuning"),
        *("fit", "teardown"),
    ]
    assert_array_equal(diary.predictions[-1], fitted.decision_function(X))
    # After the first epoch it is what a fit of one epoch gives (at a constant rate).
    short = {"finetune_epochs": 0, "schedule": "constant"}
    diary = Diary()
    classifier(**short).set_callbacks(diary).fit(X, y)
    one = classifier(head_epochs=1, **short).fit(X, y)
    assert_array_equal(diary.predictions[0], one.decision_function(X))


def test_callbacks_change_nothing_and_may_stop_a_stage(digits):
    X, y = digits[0][:60], digits[1][:60]

    watched = classifier().set_callbacks(Diary()).fit(X, y)
    stopped = classifier().set_callbacks(Diary(n_epochs=1)).fit(X, y)

    assert losses(watched) == losses(classifier().fit(X, y))
    assert [record["stage"] for record in stopped.history_] == ["head", "fine-tuning"]


@pytest.mark.parametrize("weights", [None, np.linspace(0, 1, 60)])
def test_scikit_learns_own_monitor_scores_each_epoch(weights, digits):
    X, y = digits[0][:60], digits[1][:60]
    monitor = callback.ScoringMonitor(scoring="accuracy")

    fitted = classifier().set_callbacks(monitor).fit(X, y, sample_weight=weights)

    rows = monitor.get_logs().data
    assert [row["task_name"] for row in rows].count("epoch") == 5
    expected = accuracy_score(y, fitted.predict(X), sample_weight=weights)
    assert rows[0]["accuracy"] == pytest.approx(expected)


def test_a_searchs_progress_bar_counts_the_epochs_too(digits):
    X, y = digits[0][:60], digits[1][:60]
    search = GridSearchCV(classifier(head_epochs=2), {"unfreeze": [None, 1]}, cv=2)

    search.set_callbacks(callback.ProgressBar()).fit(X, y)

    assert search.best_score_ > 0.5


def test_verbose_shows_a_bar_for_each_stage(digits, capsys):
    classifier(verbose=1).fit(digits[0][:60], digits[1][:60])

    shown = capsys.readouterr().err
    assert "head: 100%" in shown
    assert "fine-tuning: 100%" in shown
