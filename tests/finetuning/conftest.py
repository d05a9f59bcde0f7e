"""Data and fitted classifiers that several test files of this folder need."""

import pytest
from tiny_classifier import classifier


@pytest.fixture(scope="session")
def data(digits):
    """Sixty digits as rows, and their labels."""
    return digits[0][:60], digits[1][:60]


@pytest.fixture(scope="session")
def fitted(data):
    """The small classifier, fitted; copy it before you change it."""
    return classifier().fit(*data)


@pytest.fixture(scope="session")
def fitted_hidden(data):
    """The same with a hidden layer and dropout in its head."""
    return classifier(hidden_units=(8,), dropout=0.2).fit(*data)
