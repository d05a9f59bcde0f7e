"""Figures without a screen."""

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def without_a_screen():
    with mpl.rc_context({"backend": "agg"}):
        yield
        plt.close("all")
