"""Labels, weights and held-out images."""

import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
from numpy.testing import assert_allclose
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GroupKFold, cross_validate
from tiny_classifier import classifier, losses

from skltl.finetuning._data import TrainingData, hold_out, split_examples


def test_strings_are_class_labels(digits):
    X, y = digits[0][:100], np.array([f"digit {n}" for n in digits[1][:100]])

    fitted = classifier().fit(X, y)

    assert fitted.classes_.dtype == y.dtype
    assert set(fitted.predict(X)) <= set(y)
    assert_allclose(fitted.predict_proba(X).sum(axis=1), 1)
    assert fitted.score(X, y) > 0.9


def test_two_classes_have_one_decision(data):
    X, y = data[0], data[1] > 4

    fitted = classifier(head_epochs=1, finetune_epochs=1).fit(X, y)

    decision, proba = fitted.decision_function(X), fitted.predict_proba(X)
    assert decision.shape == (60,)
    assert_allclose(1 / (1 + np.exp(-decision)), proba[:, 1])


def test_invalid_images_and_labels_are_refused(digits):
    X, y = digits[0][:10], digits[1][:10].astype(object)

    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier().fit(X, y[:5])
    with pytest.raises(ValueError, match="NaN or None"):
        classifier().fit(X, [*y[:9], None])
    with pytest.raises(ValueError, match="continuous"):
        classifier().fit(X, np.linspace(0, 1, 10))
    with pytest.raises(ValueError, match="y has one class only, 3"):
        classifier().fit(X, np.full(10, 3))
    with pytest.raises(NotFittedError):
        classifier().predict(X)


@pytest.mark.parametrize("as_column", [lambda y: y[:, None], pd.DataFrame])
def test_a_column_of_labels_gives_one_warning_in_the_users_line(as_column, data):
    X, y = data
    short = classifier(head_epochs=1, finetune_epochs=0)

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        found = losses(short.fit(X, as_column(y)))

    assert found == losses(short.fit(X, y))
    assert [warning.category for warning in record] == [DataConversionWarning]
    assert record[0].filename == __file__


def test_balanced_weights_raise_the_recall_of_a_rare_class(digits):
    is_rare = digits[1] == 8
    X = np.concatenate([digits[0][~is_rare][:300], digits[0][is_rare][:5]])
    y = np.arange(305) >= 300
    unseen = digits[0][is_rare][50:]
    head_only = {"head_init": "random", "unfreeze": None, "head_epochs": 10}

    recall = [
        classifier(class_weight=weight, **head_only).fit(X, y).predict(unseen).mean()
        for weight in (None, "balanced")
    ]

    assert recall[1] > recall[0] + 0.1


@pytest.mark.parametrize("scale", [1e308, 1e-300])
def test_only_ratios_of_weights_count(scale, data):
    weights = np.linspace(0.1, 1, 60)
    short = classifier(head_epochs=1, finetune_epochs=1)

    expected = losses(short.fit(*data, sample_weight=weights))
    found = losses(short.fit(*data, sample_weight=scale * weights))

    assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, losses(short.fit(*data)), rtol=1e-4)


def test_weights_count_in_batches_of_one_image(data):
    X, y = data
    head_only = {"batch_size": 1, "head_init": "random", "unfreeze": None}
    weights = np.where(y == 1, 100.0, 1.0)

    plain = classifier(**head_only).fit(X, y)
    weighted = classifier(**head_only).fit(X, y, sample_weight=weights)
    scaled = classifier(**head_only).fit(X, y, sample_weight=weights * 1e6)

    of_ones = [one.predict_proba(X)[:, 1].mean() for one in (plain, weighted)]
    assert of_ones[1] > 1.05 * of_ones[0]
    assert_allclose(scaled.decision_function(X), weighted.decision_function(X), 1e-3)


def test_invalid_weights_are_refused(data):
    with pytest.raises(ValueError, match="zero"):
        classifier().fit(*data, sample_weight=np.zeros(60))
    with pytest.raises(ValueError, match="[Nn]egative"):
        classifier().fit(*data, sample_weight=-np.ones(60))
    with pytest.raises(ValueError, match="weights of all training images are zero"):
        classifier(class_weight=dict.fromkeys(range(10), 0)).fit(*data)
    for weight in (-1, np.nan):
        with pytest.raises(ValueError, match="class_weight must be finite and non-neg"):
            classifier(class_weight={0: weight}).fit(*data)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4, 0.75])
def test_groups_are_held_out_as_a_whole(fraction, digits):
    y = digits[1][:200]
    groups = np.array([f"patient {n // 5}" for n in range(200)])

    training, validation = hold_out(y, groups, fraction, 0)

    assert sorted([*training, *validation]) == list(range(200))
    assert not set(groups[training]) & set(groups[validation])
    assert len(validation) / 200 == pytest.approx(fraction, abs=0.06)
    assert set(y[training]) == set(y)


@pytest.mark.parametrize(("fraction", "n_rare"), [(0.1, 2), (0.5, 2), (0.02, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_does_not_enlarge_the_validation_set(fraction, n_rare, seed):
    y = np.repeat([0, 1, 2], [500, 500 - n_rare, n_rare])
    groups = np.arange(1000) // 2

    training, validation = hold_out(y, groups, fraction, seed)

    assert len(validation) / 1000 == pytest.approx(fraction, abs=0.01)
    assert set(y[training]) == {0, 1, 2}


def test_early_stopping_holds_out_a_tenth_of_each_class():
    y = np.repeat([0, 1], [160, 40])
    estimator = classifier(early_stopping=True)

    data = TrainingData(None, y, None, None)
    examples = split_examples(estimator, data, np.ones(200), 0)

    assert sorted([*examples.training, *examples.validation]) == list(range(200))
    assert np.bincount(y[examples.validation]).tolist() == [16, 4]


@pytest.mark.parametrize("has_groups", [False, True])
def test_the_validation_score_is_that_of_held_out_images(has_groups, digits):
    X, y = digits[0][:120], digits[1][:120]
    groups = np.arange(120) // 4 if has_groups else None

    fitted = classifier(validation_fraction=0.25).fit(X, y, groups=groups)

    _, validation = hold_out(y, groups, 0.25, 0)
    expected = fitted.score(X[validation], y[validation])
    assert fitted.history_[-1]["validation_score"] == pytest.approx(expected)


def test_too_few_images_for_a_validation_set_are_refused(digits):
    X, y = digits[0][:20], digits[1][:20]

    with pytest.raises(ValueError, match=r"validation_fraction=0.9 cannot .* 20 image"):
        classifier(validation_fraction=0.9).fit(X, y)
    with pytest.raises(ValueError, match="groups: too few .* a total of 1 and"):
        classifier(early_stopping=True).fit(X, y, groups=np.zeros(20))
    with pytest.raises(ValueError, match="must not be the classes themselves"):
        classifier(early_stopping=True).fit(X, y, groups=y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier().fit(X, y, groups=y[:9])


def test_groups_are_routed_in_cross_validation(digits):
    X, y = digits[0][:120], digits[1][:120]
    groups = np.arange(120) // 4
    with sklearn.config_context(enable_metadata_routing=True):
        routed = classifier(validation_fraction=0.2).set_fit_request(groups=True)

        found = cross_validate(
            routed, X, y, cv=GroupKFold(2), params={"groups": groups}
        )

    assert (found["test_score"] > 0.5).all()
