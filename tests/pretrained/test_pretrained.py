"""The pretrained classifier: the network's own categories, or classes made of them."""

import pickle

import joblib
import numpy as np
import pytest
import skops.io
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict
from torch import nn
from torchvision.models import SqueezeNet1_1_Weights, get_model

import skltl
from skltl import Backbone, Preprocessing, PretrainedCNNClassifier
from skltl.exceptions import WeightsError
from skltl.networks import get_backbone, imagenet_names, load_network, resolve_weights


def preprocess(images, preprocessing):
    """Return the input of the network (n, 3, h, w), computed by torch alone."""
    crops = np.stack([preprocessing.crop(image) for image in images])
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std


def tiny_logits(images):
    """Return the logits of the tiny network, computed by torch alone."""
    backbone = get_backbone("tiny")
    weights = resolve_weights(backbone, "pretrained")
    network = load_network(backbone, weights, backbone.preprocessing.size)
    with torch.inference_mode():
        return network.logits(preprocess(images, backbone.preprocessing)).double()


def tiny(**parameters):
    return PretrainedCNNClassifier("tiny", precision="float32", **parameters)


def test_logits_and_probabilities_match_torch(images):
    logits = tiny_logits(images)

    fitted = tiny().fit(images)

    assert_array_equal(fitted.classes_, np.sort(fitted.categories_))
    order = np.argsort(fitted.categories_)
    expected = logits.numpy()
    decision = fitted.decision_function(images)
    assert_allclose(decision, expected[:, order], rtol=1e-3, atol=1e-4)
    proba = logits.softmax(dim=1).numpy()
    assert_allclose(fitted.predict_proba(images), proba[:, order], rtol=1e-3, atol=1e-6)
    best = expected.argmax(axis=1)
    assert_array_equal(fitted.predict(images), fitted.categories_[best])
    top = fitted.predict_top_k(images, k=3)
    assert_array_equal(top, fitted.categories_[np.argsort(-expected, axis=1)[:, :3]])
    with pytest.raises(ValueError, match="k=201 must be an integer from 1 to 200"):
        fitted.predict_top_k(images, k=201)


def test_classes_are_imagenet_categories():
    names = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]

    fitted = PretrainedCNNClassifier("squeezenet1_1", weights=None).fit(["a.jpg"])

    assert fitted.categories_.tolist() == names
    assert len(set(fitted.classes_)) == 1000


def test_wordnet_ids_follow_the_order_of_the_logits():
    names = imagenet_names()

    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert names["n01440764"] == "tench"
    assert names["n02123045"] == "tabby"
    assert names["n15075141"] == "toilet tissue"


def test_class_map_sums_probabilities(images):
    names = tiny().fit(images).categories_
    wordnet_id = {name: wnid for wnid, name in imagenet_names().items()}[names[7]]
    proba = tiny_logits(images).softmax(dim=1).numpy()

    fitted = tiny(class_map={"b": [names[3], 5], "a": wordnet_id}).fit(images)

    expected = np.stack([proba[:, 7], proba[:, [3, 5]].sum(axis=1)], axis=1)
    expected /= expected.sum(axis=1, keepdims=True)
    assert fitted.classes_.tolist() == ["a", "b"]
    assert_allclose(fitted.predict_proba(images), expected, rtol=1e-3, atol=1e-6)
    best = np.array(["a", "b"])[expected.argmax(axis=1)]
    assert_array_equal(fitted.predict(images), best)


def test_learned_class_map_is_the_expected_empirical_predictor(images):
    y = np.array(["x", "y", "z"] * 3)
    weights = np.arange(1.0, 10)
    proba = tiny_logits(images).softmax(dim=1).numpy()

    fitted = tiny(class_map="learn").fit(images, y, sample_weight=weights)

    joint = np.stack(
        [weights[y == label] @ proba[y == label] for label in "xyz"], axis=1
    )
    expected = joint / joint.sum(axis=1, keepdims=True)
    assert fitted.classes_.tolist() == ["x", "y", "z"]
    assert_allclose(fitted.class_map_, expected, rtol=1e-3, atol=1e-6)
    found = fitted.predict_proba(images)
    assert_allclose(found, proba @ expected, rtol=1e-3, atol=1e-5)


def test_invalid_class_maps_are_refused_and_keep_the_previous_fit(images):
    messages = {
        "'no such thing' of class 'a' is not a category": {"a": "no such thing"},
        "'goldfsh' .* Did you mean 'goldfish'": {"a": "goldfsh"},
        "an index from 0 to 199": {"a": 200},
        "True of class 'a' is not a category": {"a": True},
        "is in more than one class": {"a": [1, 2], "b": 2},
        "class 'a' must have a category or a list .* got \\[\\]": {"a": []},
        "class 'a' must have a category or a list .* got None": {"a": None},
        "all strings or all integers": {"a": 1, 2: 3},
    }
    fitted = tiny().fit(images[:2])
    expected = fitted.predict(images[:2])

    for message, class_map in messages.items():
        fitted.set_params(class_map={**class_map, "b": 2, **class_map})
        with pytest.raises(ValueError, match=message):
            fitted.fit(images[:2])
    with pytest.raises(ValueError, match="at least two classes"):
        fitted.set_params(class_map={"a": 1}).fit(images[:2])

    assert_array_equal(fitted.predict(images[:2]), expected)


def test_convolutional_head_of_a_weights_file(images, tmp_path):
    """SqueezeNet's head is a convolution: its input is a feature map."""
    model = get_model("squeezenet1_1", weights=None, num_classes=7).eval()
    path = tmp_path / "seven.safetensors"
    save_file(model.state_dict(), path)
    with torch.inference_mode():
        batch = preprocess(images[:3], get_backbone("squeezenet1_1").preprocessing)
        expected = model(batch).numpy()

    fitted = PretrainedCNNClassifier(
        "squeezenet1_1", weights=path, precision="float32"
    ).fit(images)

    assert fitted.classes_.tolist() == list(range(7))  # the names are unknown
    decision = fitted.decision_function(images[:3])
    assert_allclose(decision, expected, rtol=1e-3, atol=1e-4)
    loaded = pickle.loads(pickle.dumps(fitted))
    assert_array_equal(loaded.decision_function(images[:3]), decision)


def test_custom_backbone_needs_a_head(images):
    blocks = {"stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())}
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    preprocessing = Preprocessing(16)
    with_head, without_head = (
        Backbone.from_blocks("mine", blocks, end, preprocessing=preprocessing)
        for end in (head, None)
    )
    with torch.inference_mode():
        expected = head(blocks["stem"](preprocess(images, preprocessing))).numpy()

    fitted = PretrainedCNNClassifier(with_head, precision="float32").fit(images)

    for classifier in (fitted, pickle.loads(pickle.dumps(fitted))):
        scores = classifier.decision_function(images)
        assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(WeightsError, match="'mine' .* no head"):
        PretrainedCNNClassifier(without_head).fit(images)


SAVING = {
    "pickle": lambda fitted, path: pickle.loads(pickle.dumps(fitted)),
    "joblib": lambda fitted, path: joblib.load(joblib.dump(fitted, path)[0]),
    "skops": lambda fitted, path: skops.io.loads(
        skops.io.dumps(fitted), trusted=skltl.SKOPS_TRUSTED
    ),
}


@pytest.mark.parametrize("saving", SAVING)
def test_saved_classifier_gives_the_same_bits(saving, images, tmp_path):
    for class_map in (None, "learn"):
        fitted = tiny(class_map=class_map).fit(images, list("abc") * 3)

        loaded = SAVING[saving](fitted, tmp_path / "file")

        assert_array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
        assert_array_equal(loaded.classes_, fitted.classes_)


def test_unfitted_classifier_is_refused(images):
    with pytest.raises(NotFittedError):
        tiny().predict_top_k(images)


def test_cross_validation_learns_the_map_of_each_fold(images):
    X, y = np.concatenate([images, images]), np.array(list("abc") * 6)
    first, second = np.arange(9), np.arange(9, 18)

    found = cross_val_predict(
        tiny(class_map="learn"), X, y, cv=[(first, second), (second, first)]
    )

    expected = tiny(class_map="learn").fit(images, y[:9]).predict(images)
    assert_array_equal(found, np.concatenate([expected, expected]))
