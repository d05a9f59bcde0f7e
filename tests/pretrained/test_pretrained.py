"""A pretrained network as it is: its categories, or the user's classes made of them."""

import pickle

import joblib
import numpy as np
import pytest
import skops.io
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from torch import nn
from torchvision.models import SqueezeNet1_1_Weights, get_model

import skltl
from skltl import Backbone, Preprocessing, PretrainedCNNClassifier
from skltl.exceptions import WeightsError
from skltl.networks import get_backbone, imagenet_names, load_network, resolve_weights


def by_hand(images):
    """Return the logits of the tiny network, run by torch alone."""
    backbone = get_backbone("tiny")
    network = load_network(backbone, resolve_weights(backbone, "imagenet"))
    crops = np.stack([backbone.preprocessing.crop(image) for image in images])
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    batch = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        return network.logits(batch).numpy()


def tiny(**parameters):
    return PretrainedCNNClassifier("tiny", precision="float32", **parameters)


def test_logits_and_probabilities_are_the_networks_own(images):
    expected = by_hand(images)

    fitted = tiny().fit(images)

    order = np.argsort(fitted.categories_)
    found = fitted.decision_function(images)
    assert_allclose(found, expected[:, order], rtol=1e-3, atol=1e-4)
    proba = torch.from_numpy(expected).softmax(dim=1).numpy()
    found = fitted.predict_proba(images)
    assert_allclose(found, proba[:, order], rtol=1e-3, atol=1e-6)
    best = expected.argmax(axis=1)
    assert_array_equal(fitted.predict(images), fitted.categories_[best])
    top = fitted.predict_top_k(images, k=3)
    assert_array_equal(top, fitted.categories_[np.argsort(-expected, axis=1)[:, :3]])
    assert_array_equal(fitted.classes_, np.sort(fitted.categories_))


def test_classes_are_the_names_of_imagenets_categories():
    names = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]

    fitted = PretrainedCNNClassifier("squeezenet1_1", weights=None).fit(["a.jpg"])

    assert fitted.categories_.tolist() == names
    assert len(set(fitted.classes_)) == 1000


def test_wordnets_numbers_stand_in_the_order_of_the_logits():
    names = imagenet_names()

    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert names["n01440764"] == "tench"
    assert names["n02123045"] == "tabby"
    assert names["n15075141"] == "toilet tissue"


def test_a_class_map_adds_probabilities_up(images):
    names = tiny().fit(images).categories_
    number = next(n for n, name in imagenet_names().items() if name == names[7])
    proba = torch.from_numpy(by_hand(images)).double().softmax(dim=1)
    everything = proba.numpy()

    fitted = tiny(class_map={"b": [names[3], 5], "a": number}).fit(images)

    shares = np.stack([everything[:, 7], everything[:, [3, 5]].sum(axis=1)], axis=1)
    expected = shares / shares.sum(axis=1, keepdims=True)
    assert fitted.classes_.tolist() == ["a", "b"]
    found = fitted.predict_proba(images)
    assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert set(fitted.predict(images)) <= {"a", "b"}


def test_a_learned_map_is_the_expected_empirical_predictor(images):
    y = np.array(["x", "y", "z"] * 3)
    weights = np.arange(1.0, 10)
    proba = torch.from_numpy(by_hand(images)).double().softmax(dim=1).numpy()

    fitted = tiny(class_map="learn").fit(images, y, sample_weight=weights)

    expected = np.zeros((200, 3))
    for number, name in enumerate("xyz"):
        of_class = weights[y == name, None] * proba[y == name]
        expected[:, number] = of_class.sum(axis=0)
    expected /= expected.sum(axis=1, keepdims=True)
    assert_allclose(fitted.class_map_, expected, rtol=1e-3, atol=1e-6)
    assert_allclose(
        fitted.predict_proba(images), proba @ expected, rtol=1e-3, atol=1e-5
    )
    assert fitted.classes_.tolist() == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"a": "no such thing", "b": 1},
            "'no such thing', of the class 'a', is no category",
        ),
        ({"a": 200, "b": 1}, "a number from 0 to 199"),
        ({"a": [1, 2], "b": 2}, "is in two classes"),
        ({"a": [], "b": 2}, "the class 'a' has no category"),
        ({"a": 1}, "at least two classes"),
        ({"a": True, "b": False}, "True, of the class 'a', is no category"),
        ({"a": None, "b": 2}, "the class 'a' must have a category or a list"),
        ({"a": 1, 2: 3}, "all texts, or all integers"),
        ({"a": "goldfsh", "b": 2}, "goldfish"),
    ],
)
def test_maps_that_do_not_fit_are_refused(class_map, message, images):
    with pytest.raises(ValueError, match=message):
        tiny(class_map=class_map).fit(images)


def test_a_fit_that_fails_changes_nothing(images):
    fitted = tiny().fit(images)
    expected = fitted.predict(images)

    with pytest.raises(ValueError, match="is no category"):
        fitted.set_params(class_map={"a": "nothing", "b": 1}).fit(images)

    assert_array_equal(fitted.predict(images), expected)


def test_heads_with_a_map_before_them_serve(images, tmp_path):
    """SqueezeNet's head is a convolution: what lies before it is no vector."""
    model = get_model("squeezenet1_1", weights=None, num_classes=7).eval()
    path = tmp_path / "seven.safetensors"
    save_file(model.state_dict(), path)
    preprocessing = get_backbone("squeezenet1_1").preprocessing
    crops = np.stack([preprocessing.crop(image) for image in images])
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    with torch.inference_mode():
        batch = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = model(batch).numpy()

    fitted = PretrainedCNNClassifier(
        "squeezenet1_1", weights=path, precision="float32"
    ).fit(images)

    assert fitted.classes_.tolist() == list(range(7))  # nobody knows their names
    assert_allclose(fitted.decision_function(images), expected, rtol=1e-3, atol=1e-4)
    assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).predict_proba(images),
        fitted.predict_proba(images),
    )


def test_networks_of_ones_own_need_a_head(images):
    blocks = {"stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())}
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with_head, without = (
        Backbone.from_blocks("mine", blocks, one, preprocessing=Preprocessing(16))
        for one in (head, None)
    )

    fitted = PretrainedCNNClassifier(with_head).fit(images)

    assert set(fitted.predict(images)) <= {0, 1, 2}
    assert pickle.loads(pickle.dumps(fitted)).predict(images).shape == (9,)
    with pytest.raises(WeightsError, match="'mine' with these weights has no head"):
        PretrainedCNNClassifier(without).fit(images)


@pytest.mark.parametrize(
    "saved",
    [
        lambda fitted, folder: pickle.loads(pickle.dumps(fitted)),
        lambda fitted, folder: joblib.load(joblib.dump(fitted, folder / "file")[0]),
        lambda fitted, folder: skops.io.loads(
            skops.io.dumps(fitted), trusted=skltl.SKOPS_TRUSTED
        ),
    ],
    ids=["pickle", "joblib", "skops"],
)
@pytest.mark.parametrize("class_map", [None, "learn"])
def test_a_saved_classifier_is_the_same(saved, class_map, images, tmp_path):
    fitted = tiny(class_map=class_map).fit(images, list("abc") * 3)

    loaded = saved(fitted, tmp_path)

    assert_array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
    assert_array_equal(loaded.classes_, fitted.classes_)


def test_top_k_and_unfitted_classifiers(images):
    with pytest.raises(NotFittedError):
        tiny().predict_top_k(images)
    with pytest.raises(ValueError, match="k=201 must be an integer from 1 to 200"):
        tiny().fit(images).predict_top_k(images, k=201)


def test_it_works_in_cross_validation(images):
    learner = clone(tiny(class_map="learn"))

    scores = cross_val_score(learner, np.concatenate([images] * 2), list("abc") * 6)

    assert np.isfinite(scores).all()
