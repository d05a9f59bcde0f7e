"""After any sequence of operations, an estimator has the output of a fresh one.

Hypothesis draws sequences of `set_params`, successful and failed fits, copies and saved
files. The model of the state machine is what was given to the last successful fit; a
new estimator that is fitted with it gives the expected output.
"""

import copy
import io
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline

import skltl
from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
)

# Replaced by a folder of the state machine where it is drawn.
FOLDER = "folder"

# Parameters that no output depends on, as the model has them.
WITHOUT_EFFECT = {"cache": None, "checkpoint": None, "n_jobs": None}

# Parameters of a fitted estimator that a saved file resets.
RESET_IN_FILES = {"cache": None, "checkpoint": None}


def read_only(array):
    array.setflags(write=False)
    return array


@dataclass(frozen=True)
class Data:
    """Images, their labels, and the `image_shape` that they need."""

    X: object
    y: object
    image_shape: object = None

    def select(self, positions):
        """Return the images at some positions."""
        if isinstance(self.X, list):
            return [self.X[position] for position in positions]
        return self.X.iloc[positions] if hasattr(self.X, "iloc") else self.X[positions]

    def with_invalid_image(self):
        """Return the same images, except that the last one is invalid."""
        if isinstance(self.X, list):
            return [*self.X[:-1], np.full_like(self.X[-1], np.nan, dtype=np.float32)]
        images = np.array(self.X, dtype=np.float64)
        images[-1] = np.nan
        return images


def make_data():
    rows, labels = load_digits(return_X_y=True)
    images = np.repeat((rows[40:51].reshape(-1, 8, 8, 1) * 15).astype(np.uint8), 3, 3)
    table = pd.DataFrame(rows[20:31] / 16).rename(columns=str)
    words = np.array(["no", "yes"])[labels % 2]
    return {
        "rows": Data(read_only(rows[:12] / 16), labels[:12] % 3, (8, 8)),
        "table": Data(table, words[20:31], (4, 16)),
        "stack": Data(read_only(images), words[40:51]),
        "list": Data([*images[:9], images[9, :5] / 255, images[10]], labels[40:51] % 2),
    }


DATA = make_data()


@dataclass(frozen=True)
class Kind:
    """A kind of estimator.

    `choices` are values of its parameters; those in `immediate` take effect when they
    are set, the others in `fit`. With `is_frozen`, `fit` learns nothing, so the
    immediate ones may as well be set before it. With `reads_in_fit`, `fit` decodes
    images. With `by_row`, the output for an image does not depend on the others at all:
    the products of scikit-learn's linear classifiers differ in the last bits.
    """

    make: object
    fixed: dict
    choices: dict
    immediate: tuple = ("precision", "engine", "device", "decode")
    is_frozen: bool = False
    reads_in_fit: bool = True
    by_row: bool = True

    def changes(self):
        """Draw parameters and new values for them."""
        each = [(name, value) for name, some in self.choices.items() for value in some]
        return st.lists(st.sampled_from(each), max_size=6)

    def fresh(self, params):
        """Return a new estimator that owns its parameters."""
        params = copy.deepcopy(params)
        own = self.make().get_params(deep=False)
        if "transformer" not in own:
            return self.make(**params)
        nested = {name: params.pop(name) for name in params.keys() - own.keys()}
        return self.make(CNNFeatureTransformer(**nested), **params)


def params_of(estimator):
    """Return the parameters of an estimator and of its transformer, if it has one."""
    params = estimator.get_params(deep=False)
    transformer = params.pop("transformer", None)
    return params if transformer is None else transformer.get_params() | params


def set_params(estimator, **params):
    """Set parameters of an estimator, or of its transformer if they are not its own."""
    own = estimator.get_params(deep=False)
    names = {name: name if name in own else f"transformer__{name}" for name in params}
    estimator.set_params(**{names[name]: value for name, value in params.items()})


COMMON = {
    "precision": ["auto", "float32", "bfloat16"],
    "engine": ["auto", "torch"],
    "device": ["auto", "cpu"],
    "decode": ["exact", "fast"],
    "n_jobs": [None, 1, 2],
    "image_shape": [None, (2, 32)],  # replaced in `fit` by that of the data
}
SIZES = {"image_size": [16, 32]}
SEEDS = {"random_state": [0, 7, np.random.RandomState(3)]}
SMALL = {"backbone": "tiny", "image_size": 32, "random_state": 0}

KINDS = {
    "transformer": Kind(
        CNNFeatureTransformer,
        {**SMALL, "layer": "block3"},
        {
            **COMMON,
            **SIZES,
            **SEEDS,
            "weights": ["pretrained", None],
            "layer": ["block3", ["stem", "block2"], 1],
            "pooling": ["avg", "avgmax", 2],
            "batch_size": ["auto", 3],
            "cache": [None, FOLDER],
        },
        immediate=("precision", "engine", "device", "decode", "batch_size"),
        is_frozen=True,
        reads_in_fit=False,
    ),
    "pretrained": Kind(
        PretrainedCNNClassifier,
        SMALL,
        {
            **COMMON,
            **SIZES,
            **SEEDS,
            "weights": ["pretrained", None],
            "class_map": [None, {"a": 3, "b": [4, 5]}],
            "batch_size": ["auto", 3],
        },
        immediate=("precision", "engine", "device", "decode", "batch_size"),
        is_frozen=True,
        reads_in_fit=False,
    ),
    "learned": Kind(
        PretrainedCNNClassifier,
        {**SMALL, "class_map": "learn"},
        {**COMMON, **SIZES, "weights": ["pretrained", None], **SEEDS},
    ),
    "tuned": Kind(
        FineTunedCNNClassifier,
        {**SMALL, "head_epochs": 1, "finetune_epochs": 1},
        {
            **COMMON,
            **SEEDS,
            "layer": ["block2", "block3"],
            "weights": ["pretrained", None],
            "pooling": ["avg", "flatten"],
            "unfreeze": ["all", 1, "batch_norm", None],
            "conv_channels": [(), (4,)],
            "hidden_units": [(), (5,)],
            "dropout": [0.0, 0.5],
            "head_init": ["probe", "random"],
            "optimizer": ["auto", "adamw"],
            "validation_fraction": [None, 0.3],
            "class_weight": [None, "balanced"],
            "batch_size": [5, 32],
            "cache": [None, FOLDER],
            "checkpoint": [None, FOLDER],
        },
    ),
    "transfer": Kind(
        TransferClassifier,
        {**SMALL, "strategy": "extract", "cv": 2},
        {
            **COMMON,
            **SEEDS,
            "weights": ["pretrained", None],
            "strategy": ["as_is", "extract", "extract_early", "finetune_top", "auto"],
            "cache": [None, FOLDER],
        },
        by_row=False,
    ),
    "advisor": Kind(
        StrategyAdvisor,
        {**SMALL, "cv": 2},
        {**COMMON, **SEEDS, "max_images": [None, 9], "cache": [None, FOLDER]},
        immediate=(),
    ),
}

# Refused by `fit`, `predict` and the like.
WRONG = [
    {"precision": "x"},
    {"engine": "steam"},
    {"device": "abacus"},
    {"decode": "quick"},
    {"n_jobs": "all"},
]

# Refused by `fit`, some of them by `fit` alone.
WRONG_IN_FIT = [
    *WRONG,
    *({"backbone": "tinny"}, {"weights": "WRONG"}, {"image_size": 0}),
    *({"layer": "block9"}, {"pooling": 99}, {"class_map": {"a": 1, "b": 1}}),
]


def through_joblib(estimator):
    file = io.BytesIO()
    joblib.dump(estimator, file)
    return joblib.load(file)


def through_skops(estimator):
    saved = skops.io.dumps(estimator)
    return skops.io.loads(saved, trusted=skltl.SKOPS_TRUSTED)


def shallow_copy(estimator):
    """Copy an estimator, but not share its transformer, as shallow copies do."""
    copied = copy.copy(estimator)
    if hasattr(copied, "transformer"):
        copied.transformer = clone(copied.transformer)
    return copied


COPIES = {"copy": shallow_copy, "deepcopy": copy.deepcopy}
FILES = {
    "pickle": lambda estimator: pickle.loads(pickle.dumps(estimator)),
    "joblib": through_joblib,
    "skops": through_skops,
}

TRANSFORMERS = ("transformer", "tuned")
METHODS = ("transform", "decision_function", "predict_proba", "predict")
RESULTS = ("layer_scores_", "lead_", "size_scores_", "n_evaluated_", "strategy_")


def output_of(estimator, X):
    """Return everything that a fitted estimator computes for images, by name."""
    found = {
        name: np.asarray(getattr(estimator, name)(X))
        for name in METHODS
        if hasattr(estimator, name)
    }
    for name in RESULTS:
        if hasattr(estimator, name):
            found[name] = repr(getattr(estimator, name))
    if hasattr(estimator, "get_feature_names_out"):
        found["names"] = list(estimator.get_feature_names_out())
    return found


def fitted_names(estimator):
    return {name for name in vars(estimator) if name.endswith("_")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None)


def global_generators():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    mine = (random.getstate(), kind, keys.tobytes(), rest)
    return (*mine, torch.get_rng_state().numpy().tobytes())


_known = {}


def expected_of(name, given, data, later):
    """Return the output and the fitted attributes of a new estimator."""
    key = pickle.dumps((name, given, data, later))
    if key not in _known:
        kind = KINDS[name]
        if kind.is_frozen:
            given = given | {key: one for key, one in later.items() if one != "auto"}
        fresh = kind.fresh(given).fit(DATA[data].X, DATA[data].y)
        set_params(fresh, **later)
        _known[key] = output_of(fresh, DATA[data].X), fitted_names(fresh)
    return _known[key]


@dataclass
class Tracked:
    """An estimator, its parameters, and what its last fit was given."""

    estimator: object
    params: dict
    given: dict | None = None
    data: str = ""

    def copied(self, estimator, **changed):
        """Return the same for a copy with some changed parameters."""
        here = self.params.keys() & changed.keys()
        params = {**self.params, **{name: changed[name] for name in here}}
        return Tracked(estimator, params, self.given, self.data)


class EstimatorMachine(RuleBasedStateMachine):
    """Operations on an estimator and its copies; subclasses name the kind."""

    name = ""

    def __init__(self):
        super().__init__()
        self.kind = KINDS[self.name]
        self.folder = Path(tempfile.mkdtemp(prefix="skltl-any-order-"))
        self.others = []

    def teardown(self):
        for tracked in self.others:  # operations on their copies changed nothing
            self.check(tracked)
        shutil.rmtree(self.folder, ignore_errors=True)

    @initialize(draw=st.data(), data=st.sampled_from([*sorted(DATA), None]))
    def begin(self, draw, data):
        estimator = self.kind.fresh(self.kind.fixed)
        self.now = Tracked(estimator, params_of(estimator))
        self.generators = global_generators()
        if data is not None:
            self.fit(draw, data)

    def check(self, tracked):
        """Compare an estimator with a new one that is fitted in the same way."""
        params = params_of(tracked.estimator)
        assert params.keys() == tracked.params.keys()
        for name, value in tracked.params.items():
            if not hasattr(value, "get_state"):
                assert params[name] == value, name
        if tracked.given is None:
            with pytest.raises(NotFittedError):
                self.compute(tracked.estimator, DATA["stack"].X)
            return
        later = {name: tracked.params[name] for name in self.kind.immediate}
        expected, names = expected_of(self.name, tracked.given, tracked.data, later)
        assert fitted_names(tracked.estimator) == names
        assert_same(output_of(tracked.estimator, DATA[tracked.data].X), expected)

    def has_output(self):
        """Return whether the estimator is fitted and has an output for images."""
        return self.now.given is not None and self.name != "advisor"

    def compute(self, estimator, X):
        """Call the first method of the estimator that uses images."""
        for name in METHODS:
            if hasattr(estimator, name):
                return getattr(estimator, name)(X)
        return estimator.report()

    @invariant()
    def output_is_that_of_a_fresh_estimator(self):
        self.check(self.now)

    @invariant()
    def global_generators_are_unchanged(self):
        assert global_generators() == self.generators

    @rule(draw=st.data())
    def set_parameters(self, draw):
        for name, value in draw.draw(self.kind.changes()):
            own = copy.deepcopy(value)
            own = str(self.folder / name) if value == FOLDER else own
            set_params(self.now.estimator, **{name: own})
            self.now.params[name] = own

    @rule(draw=st.data(), data=st.sampled_from(sorted(DATA)))
    def fit(self, draw, data):
        self.set_parameters(draw)
        self.now.params["image_shape"] = DATA[data].image_shape
        set_params(self.now.estimator, image_shape=DATA[data].image_shape)
        # Copied before the fit, which may draw from a generator among them.
        given = copy.deepcopy(params_of(self.now.estimator))
        self.now.estimator.fit(DATA[data].X, DATA[data].y)
        here = given.keys() & WITHOUT_EFFECT.keys()
        self.now.given = given | {name: WITHOUT_EFFECT[name] for name in here}
        self.now.data = data

    def fail_to_fit(self, X, y, **params):
        """Fit in vain, with other parameters for the moment."""
        before = {name: self.now.params[name] for name in params}
        set_params(self.now.estimator, **params)
        with pytest.raises((ValueError, TypeError)):
            self.now.estimator.fit(X, y)
        set_params(self.now.estimator, **before)

    @rule(data=st.sampled_from(sorted(DATA)), wrong=st.sampled_from(WRONG_IN_FIT))
    def fail_to_fit_with_a_wrong_parameter(self, data, wrong):
        if wrong.keys() <= self.kind.fixed.keys() | self.kind.choices.keys():
            shape = {"image_shape": DATA[data].image_shape}
            self.fail_to_fit(DATA[data].X, DATA[data].y, **shape, **wrong)

    @rule(data=st.sampled_from(sorted(DATA)), is_short=st.booleans())
    def fail_to_fit_other_data(self, data, is_short):
        X, y, image_shape = DATA[data].X, DATA[data].y, DATA[data].image_shape
        if is_short or not (self.kind.reads_in_fit or image_shape):
            y = y[:-1]
        else:
            X = DATA[data].with_invalid_image()
        self.fail_to_fit(X, y, image_shape=image_shape)

    @precondition(lambda self: self.has_output())
    @rule(wrong=st.sampled_from(WRONG))
    def use_a_wrong_parameter_after_fit(self, wrong):
        (name,) = wrong
        set_params(self.now.estimator, **wrong)
        with pytest.raises((ValueError, TypeError)):
            self.compute(self.now.estimator, DATA[self.now.data].X)
        set_params(self.now.estimator, **{name: self.now.params[name]})

    @rule(draw=st.data(), way=st.sampled_from(sorted(COPIES)))
    def continue_with_a_copy(self, draw, way):
        self.others.append(self.now)
        self.now = self.now.copied(COPIES[way](self.now.estimator))
        self.set_parameters(draw)

    @rule(draw=st.data(), way=st.sampled_from(sorted(FILES)))
    def continue_with_a_saved_one(self, draw, way):
        self.others.append(self.now)
        is_fitted = self.now.given is not None
        reset = RESET_IN_FILES if is_fitted else {}
        self.now = self.now.copied(FILES[way](self.now.estimator), **reset)
        self.set_parameters(draw)

    @rule(draw=st.data(), data=st.sampled_from([*sorted(DATA), None]))
    def continue_with_a_clone(self, draw, data):
        self.others.append(self.now)
        self.now = Tracked(clone(self.now.estimator), dict(self.now.params))
        self.check(self.now)
        if data is not None:
            self.fit(draw, data)

    @precondition(lambda self: self.others)
    @rule(number=st.integers(0, 9))
    def continue_with_another(self, number):
        number %= len(self.others)
        self.now, self.others[number] = self.others[number], self.now

    @rule(draw=st.data())
    def release_memory(self, draw):
        skltl.release_memory()
        self.set_parameters(draw)

    @rule(draw=st.data())
    def delete_the_folders(self, draw):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.set_parameters(draw)

    @precondition(lambda self: self.has_output())
    @rule(order=st.permutations(range(9)), n=st.sampled_from([1, 2, 9]))
    def compute_for_some_images_in_another_order(self, order, n):
        estimator, data, some = self.now.estimator, DATA[self.now.data], order[:n]
        everything = output_of(estimator, data.X)
        for name, found in output_of(estimator, data.select(some)).items():
            if name == "names" or isinstance(found, str):
                continue
            if self.kind.by_row or found.dtype.kind != "f":
                np.testing.assert_array_equal(found, everything[name][some], name)
            else:
                np.testing.assert_allclose(found, everything[name][some], rtol=1e-5)

    @precondition(lambda self: self.has_output())
    @rule()
    def compute_inside_other_estimators(self):
        X = DATA[self.now.data].X
        expected = output_of(self.now.estimator, X)
        frozen = FrozenEstimator(self.now.estimator)
        for name in METHODS:
            if name in expected:
                found = getattr(make_pipeline(frozen), name)(X)
                np.testing.assert_array_equal(found, expected[name], name)

    @precondition(lambda self: self.has_output() and self.name in TRANSFORMERS)
    @rule()
    def transform_to_a_data_frame(self):
        data, estimator = DATA[self.now.data], copy.deepcopy(self.now.estimator)
        table = estimator.set_output(transform="pandas").transform(data.X)
        np.testing.assert_array_equal(
            table.to_numpy(), self.now.estimator.transform(data.X)
        )
        assert table.columns.tolist() == estimator.get_feature_names_out().tolist()

    @precondition(lambda self: self.now.given is not None and self.name == "tuned")
    @rule(precision=st.sampled_from(COMMON["precision"][1:]), refits=st.booleans())
    def convert_to_a_transformer(self, precision, refits):
        X = DATA[self.now.data].X
        # "auto" could stand for another precision in the next fit.
        tuned = copy.copy(self.now.estimator).set_params(precision=precision)
        made = tuned.to_transformer()
        made = clone(made).fit(X) if refits else made
        np.testing.assert_array_equal(made.transform(X), tuned.transform(X))


def machine(name, max_examples, n_steps=25):
    """Return the test case of one kind of estimator."""
    operations = type(f"{name.title()}Machine", (EstimatorMachine,), {"name": name})
    operations.TestCase.settings = settings(
        derandomize=True,
        deadline=None,
        max_examples=max_examples,
        stateful_step_count=n_steps,
        # Explaining a failure takes longer than finding it.
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return operations.TestCase


TestFewTransformer = machine("transformer", 4, 8)
TestFewPretrained = machine("pretrained", 2, 8)
TestFewTuned = machine("tuned", 2, 8)
TestFewTransfer = machine("transfer", 2, 8)

TestTransformer = pytest.mark.slow(machine("transformer", 30))
TestPretrained = pytest.mark.slow(machine("pretrained", 10))
TestLearned = pytest.mark.slow(machine("learned", 6))
TestTuned = pytest.mark.slow(machine("tuned", 12))
TestTransfer = pytest.mark.slow(machine("transfer", 8))
TestAdvisor = pytest.mark.slow(machine("advisor", 8))


@pytest.mark.slow
def test_another_process_computes_the_same_output(tmp_path):
    X, y = DATA["rows"].X, DATA["rows"].y
    here = {}
    for name, kind in KINDS.items():
        estimator = kind.fresh({**kind.fixed, "image_shape": (8, 8)}).fit(X, y)
        joblib.dump(estimator, tmp_path / f"{name}.joblib")
        here[name] = output_of(estimator, X)
    folders = [Path(skltl.__file__).parents[1], Path(__file__).parent]
    code = (
        "import joblib, pathlib, sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"sys.path[:0] = {[str(path) for path in folders]!r}\n"
        "from test_any_order import DATA, KINDS, output_of\n"
        f"folder, X = pathlib.Path({str(tmp_path)!r}), DATA['rows'].X\n"
        "read = lambda name: joblib.load(folder / f'{name}.joblib')\n"
        "found = {name: output_of(read(name), X) for name in KINDS}\n"
        "joblib.dump(found, folder / 'found')\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)

    found = joblib.load(tmp_path / "found")
    assert found.keys() == here.keys()
    for name, expected in here.items():
        assert_same(found[name], expected)
