"""Data of the classifiers' tests."""

import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows / 16, labels
