"""The public names are exactly those of ``__all__``, and importing skltl is cheap."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from sklearn.base import BaseEstimator

import skltl
from skltl import exceptions


def test_all_names_exist_and_are_listed():
    for name in skltl.__all__:
        assert getattr(skltl, name) is not None

    assert sorted(skltl.__all__) == sorted(dir(skltl))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'CNNTransformer'"):
        _ = skltl.CNNTransformer


def test_importing_skltl_does_not_import_torch():
    code = (
        "import sys, skltl; "
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'torchvision', "
        "'sklearn', 'numpy'})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"


def test_all_exceptions_are_listed_and_documented():
    defined = {
        name
        for name, one in vars(exceptions).items()
        if inspect.isclass(one) and issubclass(one, Exception)
    }

    assert defined == set(exceptions.__all__)
    listed = (Path(__file__).parents[2] / "docs/api.rst").read_text()
    for name in defined:
        assert name in exceptions.__doc__
        assert f"exceptions.{name}\n" in listed


def test_types_trusted_in_skops_files_exist_and_include_all_estimators():
    public = (getattr(skltl, name) for name in skltl.__all__)
    estimators = {
        f"skltl.{one.__name__}"
        for one in public
        if inspect.isclass(one) and issubclass(one, BaseEstimator)
    }
    assert estimators
    assert estimators <= set(skltl.SKOPS_TRUSTED)
    for path in skltl.SKOPS_TRUSTED:
        module, _, name = path.rpartition(".")
        assert inspect.isclass(getattr(import_module(module), name))
