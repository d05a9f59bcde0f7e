"""scikit-learn's callbacks, and progress bars, follow stages and epochs."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from tiny_classifier import classifier, losses

callback = pytest.importorskip("sklearn.callback", reason="from scikit-learn 1.9 on")


class Diary:
    """Callback that records the tasks that end, and may stop each stage."""

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


def test_callbacks_get_an_estimator_that_predicts_after_each_epoch(data, fitted):
    diary = Diary()

    watched = classifier().set_callbacks(diary).fit(*data)

    assert losses(watched) == losses(fitted)
    assert diary.tasks == [
        *("setup", *["epoch"] * 3, "head", *["epoch"] * 2, "fine-tuning"),
        *("fit", "teardown"),
    ]
    assert_array_equal(diary.predictions[-1], watched.decision_function(data[0]))


def test_after_an_epoch_the_estimator_is_that_of_a_fit_with_fewer_epochs(data):
    short = {"unfreeze": None, "schedule": "constant"}
    diary = Diary()

    classifier(**short).set_callbacks(diary).fit(*data)

    expected = classifier(head_epochs=1, **short).fit(*data)
    assert_array_equal(diary.predictions[0], expected.decision_function(data[0]))


def test_callbacks_may_stop_a_stage(data):
    stopped = classifier().set_callbacks(Diary(n_epochs=1)).fit(*data)

    assert [record["stage"] for record in stopped.history_] == ["head", "fine-tuning"]


@pytest.mark.parametrize("weights", [None, np.linspace(0, 1, 60)])
def test_scikit_learns_monitor_scores_each_epoch(weights, data):
    X, y = data
    monitor = callback.ScoringMonitor(scoring="accuracy")

    watched = classifier().set_callbacks(monitor).fit(X, y, sample_weight=weights)

    rows = monitor.get_logs().data
    assert [row["task_name"] for row in rows].count("epoch") == 5
    expected = accuracy_score(y, watched.predict(X), sample_weight=weights)
    assert rows[0]["accuracy"] == pytest.approx(expected)


def test_the_progress_bar_of_a_search_includes_the_stages(data, capsys):
    short = classifier(head_epochs=1, unfreeze=None)
    search = GridSearchCV(short, {"dropout": [0.0]}, cv=2)

    search.set_callbacks(callback.ProgressBar()).fit(*data)

    assert search.best_score_ > 0.5
    assert "FineTunedCNNClassifier - head #0" in capsys.readouterr().out


def test_verbose_shows_a_progress_bar_for_each_stage(data, capsys):
    classifier(verbose=1).fit(*data)

    shown = capsys.readouterr().err
    assert "head: 100%" in shown
    assert "fine-tuning: 100%" in shown
