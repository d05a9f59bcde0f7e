"""Docstrings are complete and correct, and describe a shared parameter identically."""

import ast
import doctest
import inspect
import re
from collections import defaultdict

import pytest
from matplotlib import pyplot as plt
from numpydoc.docscrape import ClassDoc
from numpydoc.validate import validate

import skltl

PUBLIC = [name for name in skltl.__all__ if callable(getattr(skltl, name))]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(skltl, name))]
ESTIMATORS = [name for name in CLASSES if hasattr(getattr(skltl, name), "get_params")]

# Added to every estimator by scikit-learn, and documented there.
WRITTEN_BY_SCIKIT_LEARN = re.compile(r"set_\w+_request")


def public_methods(name):
    """Yield the public methods and properties of a class that skltl defines."""
    for base in getattr(skltl, name).__mro__:
        if base.__module__.partition(".")[0] != "skltl":
            continue
        for method, defined in vars(base).items():
            # Methods that depend on another estimator are descriptors of scikit-learn.
            is_method = isinstance(defined, property) or inspect.isroutine(
                getattr(base, method)
            )
            if not (
                method.startswith("_")
                or not is_method
                or WRITTEN_BY_SCIKIT_LEARN.fullmatch(method)
            ):
                yield f"{name}.{method}"


METHODS = sorted({method for name in CLASSES for method in public_methods(name)})

# Validation codes of numpydoc that are ignored: an extended summary (ES01) and related
# objects (SA01) are optional, and a method's example (EX01) is in its class.
OPTIONAL = {"ES01", "SA01", "EX01"}
DEFAULT = re.compile(r"^([\w, ]+) : .*default=(\S.*?)\s*$", re.MULTILINE)


def faults(path):
    errors = validate(f"skltl.{path}")["errors"]
    return {code: text for code, text in errors if code not in OPTIONAL}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_with_an_example(name):
    assert faults(name) == {}
    assert ">>> " in inspect.getdoc(getattr(skltl, name))


def test_methods_are_found():
    assert {
        "CNNFeatureTransformer.transform",
        "FineTunedCNNClassifier.from_pipeline",
        "TransferClassifier.predict_proba",
        "LayerScoresDisplay.best_",
    } <= set(METHODS)


@pytest.mark.parametrize("path", METHODS)
def test_public_methods_are_documented(path):
    assert faults(path) == {}


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


# pytest's --doctest-modules finds functions in the module that defines them, but no
# class whose `__module__` is "skltl".
@pytest.mark.parametrize("name", CLASSES)
def test_examples_of_classes_run(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(verbose=False, optionflags=options)
    report = []

    for test in doctest.DocTestFinder().find(getattr(skltl, name), name, module=False):
        runner.run(test, out=report.append)
    plt.close("all")

    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert runner.tries > 0


# Parameters whose type and default differ between estimators, and why.
DIFFERENT_TYPES = {
    "batch_size": "a training batch of the classifier has no automatic size",
    "layer": "only the transformer returns the features of several layers",
    "n_views": "views whose features are averaged, or augmented views to train on",
}

# Parameters whose description differs between estimators, and why.
DIFFERENT_DESCRIPTIONS = {
    "batch_size": "images per forward pass, or per training step",
    "cache": "pooled features, or activations of the frozen blocks",
    "layer": "features of a layer, or the layer from which training starts",
    "n_views": "views whose features are averaged, or augmented views to train on",
    "pooling": "only the transformer describes all kinds of pooling",
    "precision": "the weights of a fine-tuned network stay in float32",
    "random_state": "what is random differs",
    "transformer": "what else it configures, and the use of its layer, differ",
    "weights": "without a head, with the original head, or trained from scratch",
}
REFERENCE = re.compile(r"(See|As (for|in)) :?(class:)?`~?(skltl\.)?CNNFeatureTransform")


def documented_differently(read):
    """Return the shared parameters of which estimators document several texts."""
    found = defaultdict(lambda: defaultdict(list))
    for name in ESTIMATORS:
        for parameter in ClassDoc(getattr(skltl, name))["Parameters"]:
            if (text := read(parameter)) is not None:
                found[parameter.name][text].append(name)
    return {
        parameter: [f"{', '.join(names)}: {text}" for text, names in texts.items()]
        for parameter, texts in found.items()
        if len(texts) > 1
    }


def read_type(parameter):
    return parameter.type


def read_description(parameter):
    """Return the description, or None where it refers to another estimator's."""
    text = " ".join(" ".join(parameter.desc).split())
    return None if REFERENCE.match(text) else text


@pytest.mark.parametrize(
    ("read", "excuses"),
    [
        pytest.param(read_type, DIFFERENT_TYPES, id="type and default"),
        pytest.param(
            read_description,
            DIFFERENT_DESCRIPTIONS,
            id="description",
        ),
    ],
)
def test_shared_parameters_are_documented_identically(read, excuses):
    found = documented_differently(read)

    unexcused = {name: texts for name, texts in found.items() if name not in excuses}
    message = "\n".join(
        f"The estimators document the parameter {name!r} differently:\n  "
        + "\n  ".join(texts)
        for name, texts in unexcused.items()
    )
    assert not unexcused, message
    # An excuse that is not needed any more would hide the next difference.
    assert excuses.keys() <= found.keys()
