"""Without Dask, everything else works, and an error names the extra to install."""

import sys

import numpy as np
import pytest
from numpydoc.validate import validate

import skltl
from skltl import CNNFeatureTransformer
from skltl.distributed import BatchFunction, apply


def test_apply_names_the_extra(monkeypatch, images):
    monkeypatch.setitem(sys.modules, "dask", None)
    transformer = CNNFeatureTransformer("tiny").fit(images)

    with pytest.raises(ImportError, match=r"pip install 'skltl\[dask\]'"):
        apply(transformer, images)
    assert BatchFunction(transformer)({"path": images})["features"].shape == (9, 288)
    assert np.isfinite(transformer.transform(images)).all()


@pytest.mark.parametrize("name", skltl.distributed.__all__)
def test_public_names_are_documented(name):
    errors = dict(validate(f"skltl.distributed.{name}")["errors"])

    assert not errors.keys() - {"ES01", "SA01"}
