"""The estimators pass scikit-learn's own checks; every exception has a reason."""

import os

import pytest
import sklearn
from sklearn.base import is_classifier
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_estimator,
    check_get_feature_names_out_error,
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_param_validation,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
)

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
)

# The checks fit on small tables, of which each row becomes an image one pixel high.
ROWS = {"image_shape": (1, -1), "image_size": 8, "n_jobs": 1}
LARGE_ROWS = {"image_shape": (1, -1)}
# Without weights, which this network of 0.4 million parameters has on the Hub only.
VIT = {**ROWS, "backbone": "timm:test_vit", "weights": None, "image_size": 32}

WEIGHTS_AND_REPEATS = "check_sample_weight_equivalence_on_dense_data"
GRADIENT_DESCENT = {
    WEIGHTS_AND_REPEATS: "mini-batches depend on the rows, as in scikit-learn's SGD"
}
FOLDS = {WEIGHTS_AND_REPEATS: "the folds depend on the rows, and `cv` is their number"}

# Estimator, least number of checks, and checks that it may fail.
SUITES = {
    "transformer": (
        CNNFeatureTransformer("tiny", layer=["stem", -1], pooling="avgmax", **ROWS),
        40,
        {},
    ),
    "vision transformer": (
        CNNFeatureTransformer(
            **VIT, layer=["blocks.1", -1], pooling="cls+avg", random_state=0
        ),
        40,
        {},
    ),
    "pretrained": (
        PretrainedCNNClassifier("tiny", class_map="learn", batch_size=64, **ROWS),
        50,
        {},
    ),
    "fine-tuned": (
        FineTunedCNNClassifier(
            "tiny",
            layer="stem",
            unfreeze=1,
            head_epochs=1,
            finetune_epochs=1,
            random_state=0,
            **ROWS,
        ),
        60,
        GRADIENT_DESCENT,
    ),
    "regressor": (
        FineTunedCNNRegressor(
            "tiny",
            layer="stem",
            unfreeze=1,
            head_epochs=1,
            finetune_epochs=1,
            random_state=0,
            **ROWS,
        ),
        50,
        GRADIENT_DESCENT,
    ),
    "transfer": (
        TransferClassifier(
            CNNFeatureTransformer("tiny", **ROWS),
            strategy="extract",
            cv=2,
            random_state=0,
        ),
        50,
        FOLDS,
    ),
}
SLOW_SUITES = {
    "transformer, one layer": (
        CNNFeatureTransformer("tiny", layer="block1", **LARGE_ROWS),
        40,
        {},
    ),
    "transformer, defaults": (CNNFeatureTransformer("tiny", **LARGE_ROWS), 40, {}),
    "pretrained, one image at a time": (
        PretrainedCNNClassifier("tiny", class_map="learn", batch_size=1, **ROWS),
        50,
        {},
    ),
    "fine-tuned vision transformer": (
        FineTunedCNNClassifier(
            **VIT,
            pooling="auto",
            unfreeze=1,
            head_epochs=1,
            finetune_epochs=1,
            random_state=0,
        ),
        60,
        GRADIENT_DESCENT,
    ),
    "fine-tuned, many epochs": (
        FineTunedCNNClassifier(
            "tiny",
            layer="block2",
            unfreeze=1,
            finetune_epochs=5,
            random_state=0,
            **ROWS,
        ),
        60,
        GRADIENT_DESCENT,
    ),
    "transfer, recommended strategy": (
        TransferClassifier(CNNFeatureTransformer("tiny", **ROWS), random_state=0),
        50,
        FOLDS,
    ),
    "advisor": (
        StrategyAdvisor(CNNFeatureTransformer("tiny", **ROWS), cv=2, random_state=0),
        40,
        FOLDS,
    ),
}

FURTHER_CHECKS = [
    check_dataframe_column_names_consistency,
    check_get_feature_names_out_error,
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_param_validation,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
]


def unexpected_results(results):
    """Return the checks that neither passed nor were expected to fail.

    One of them is skipped unless a variable is set before Python starts, as in CI.
    """
    may_skip = set() if "SCIPY_ARRAY_API" in os.environ else {"check_array_api_input"}
    return {
        result["check_name"]: (result["status"], result["exception"])
        for result in results
        if result["status"] not in ("passed", "xfail")
        and result["check_name"] not in may_skip
    }


# The checks use tables of random values, and classes of one or two samples.
@pytest.mark.filterwarnings("ignore::skltl.exceptions.ImageRangeWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning")
@pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")
@pytest.mark.parametrize(
    "name",
    [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SUITES)],
)
def test_check_estimator(name):
    estimator, n_checks, excuses = (SUITES | SLOW_SUITES)[name]

    results = check_estimator(
        estimator, expected_failed_checks=excuses, on_skip=None, on_fail=None
    )

    unexpected = unexpected_results(results)
    if name == "transfer, recommended strategy":  # a support vector machine
        status, _ = unexpected.pop(
            "check_classifiers_multilabel_output_format_predict_proba"
        )
        assert status == "skipped"
    assert unexpected == {}
    assert sum(result["expected_to_fail"] for result in results) == len(excuses)
    assert len(results) > n_checks


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning")
@pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")
@pytest.mark.parametrize(
    ("kind", "step"),
    [("svm", "svm"), ("softmax", "softmax"), ("ridge", "scale"), ("ridge", "ridge")],
)
def test_steps_pass_what_those_of_scikit_learn_pass(kind, step):
    """Classifiers also pass the checks of multilabel classifiers."""
    name = "regressor" if kind == "ridge" else "classifier"
    ours = make_feature_pipeline(**{name: kind})[step]
    kinds = [one for one in type(ours).__mro__ if one.__module__.startswith("sklearn.")]
    theirs = kinds[0](**ours.get_params())
    options = {"on_skip": None, "on_fail": None}

    results, expected = (check_estimator(one, **options) for one in (ours, theirs))

    has_no_proba = {"check_classifiers_multilabel_output_format_predict_proba"}
    allowed = unexpected_results(expected).keys()
    allowed |= set() if hasattr(ours, "predict_proba") else has_no_proba
    if step == "scale":  # scikit-learn checks its own scaler without centering
        allowed |= {"check_sample_weight_equivalence_on_sparse_data"}
    assert unexpected_results(results).keys() <= allowed
    names = [result["check_name"] for result in results]
    assert any("multilabel" in one for one in names) is is_classifier(ours)


# Public checks that `check_estimator` does not run, but scikit-learn's own tests do.
@pytest.mark.filterwarnings("ignore::skltl.exceptions.ImageRangeWarning")
# Some of them fit on a table with names and transform an array, on purpose.
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
@pytest.mark.parametrize("check", FURTHER_CHECKS, ids=lambda check: check.__name__)
def test_further_public_checks(check):
    check("CNNFeatureTransformer", SUITES["transformer"][0])


@pytest.mark.parametrize("image_shape", [None, (8, 8)])
def test_tags_distinguish_images_from_rows(image_shape):
    tags = CNNFeatureTransformer("tiny", image_shape=image_shape).__sklearn_tags__()

    assert tags.input_tags.two_d_array is (image_shape is not None)
    assert tags.input_tags.string is (image_shape is None)
    assert tags.requires_fit
    assert tags.transformer_tags.preserves_dtype == ["float32"]


def test_the_transformer_requests_no_metadata():
    with sklearn.config_context(enable_metadata_routing=True):
        requests = CNNFeatureTransformer("tiny").get_metadata_routing()

    assert str(requests) == "{}"
