"""Documentation is complete, and tells the truth about defaults."""

import ast
import inspect
import re

import pytest
from numpydoc.validate import validate

import skltl

PUBLIC = [name for name in skltl.__all__ if callable(getattr(skltl, name))]
METHODS = [
    "Backbone.from_blocks",
    "CNNFeatureTransformer.fit",
    "CNNFeatureTransformer.transform",
    "CNNFeatureTransformer.get_feature_names_out",
    "FineTunedCNNClassifier.decision_function",
    "FineTunedCNNClassifier.fit",
    "FineTunedCNNClassifier.from_pipeline",
    "FineTunedCNNClassifier.get_feature_names_out",
    "FineTunedCNNClassifier.predict",
    "FineTunedCNNClassifier.predict_proba",
    "FineTunedCNNClassifier.to_transformer",
    "FineTunedCNNClassifier.transform",
    "GradCAMDisplay.from_estimator",
    "GradCAMDisplay.plot",
    "PredictionGridDisplay.from_estimator",
    "PredictionGridDisplay.plot",
    "PretrainedCNNClassifier.fit",
    "PretrainedCNNClassifier.predict_top_k",
    "StrategyAdvisor.fit",
    "StrategyAdvisor.report",
    "StrategyDisplay.from_advisor",
    "StrategyDisplay.plot",
    "TransferClassifier.decision_function",
    "TransferClassifier.fit",
    "TransferClassifier.predict",
    "TransferClassifier.predict_proba",
    "TransferGainDisplay.from_estimators",
    "TransferGainDisplay.plot",
    "LayerScoresDisplay.from_estimator",
    "LayerScoresDisplay.from_search",
    "LayerScoresDisplay.plot",
    "TrainingHistoryDisplay.from_estimator",
    "TrainingHistoryDisplay.plot",
    "Preprocessing.crop",
    "Preprocessing.resized_to",
]

# ES01: a summary that says all needs no longer one. SA01: not everything has relatives.
# EX01: a method's example is its class's.
EXCUSED = {"ES01", "SA01", "EX01"}
DEFAULT = re.compile(r"^([\w, ]+) : .*default=(\S.*?)\s*$", re.MULTILINE)


def faults(public):
    found = validate(f"{public.__module__}.{public.__qualname__}")["errors"]
    return {code: text for code, text in found if code not in EXCUSED}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_with_an_example(name):
    public = getattr(skltl, name)

    assert faults(public) == {}
    assert ">>> " in inspect.getdoc(public)


@pytest.mark.parametrize("path", METHODS)
def test_public_methods_are_documented(path):
    name, method = path.split(".")

    assert faults(getattr(getattr(skltl, name), method)) == {}


@pytest.mark.parametrize("name", PUBLIC)
def test_documented_defaults_are_the_real_ones(name):
    public = getattr(skltl, name)
    text = re.split(r"\n(?:Attributes|Returns)\n-+", inspect.getdoc(public))[0]

    documented = {
        parameter.strip(): ast.literal_eval(default)
        for parameters, default in DEFAULT.findall(text)
        for parameter in parameters.split(",")
    }

    real = {
        parameter.name: parameter.default
        for parameter in inspect.signature(public).parameters.values()
        if parameter.default is not parameter.empty
    }
    assert documented == real
