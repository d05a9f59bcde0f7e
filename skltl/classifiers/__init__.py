"""Classifiers that train layers of a ConvNet."""

from skltl.classifiers._finetuned import FineTunedCNNClassifier

__all__ = ["FineTunedCNNClassifier"]
