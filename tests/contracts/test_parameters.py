"""A parameter that cannot be used is refused in a few words that say what to do."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
)

IMAGES = np.zeros((4, 16, 16, 3), np.uint8)
LABELS = [0, 1, 0, 1]
ESTIMATORS = [CNNFeatureTransformer, PretrainedCNNClassifier, FineTunedCNNClassifier]
LONG = "x" * 100_000


def message_of(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert len(text) <= 500
    return text


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_module_as_backbone_is_told_of_from_blocks(estimator):
    message = message_of(
        lambda: estimator(models.resnet18(weights=None)).fit(IMAGES, LABELS)
    )

    assert "not a module (ResNet)" in message
    assert "skltl.Backbone.from_blocks" in message


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_state_dict_as_weights_is_told_to_be_saved(estimator):
    state = models.resnet18(weights=None).state_dict()

    message = message_of(
        lambda: estimator("resnet18", weights=state).fit(IMAGES, LABELS)
    )

    assert "not a state dict. Save it first: torch.save(state_dict" in message


@pytest.mark.parametrize(
    "parameters",
    [
        {"backbone": LONG},
        {"backbone": ["tiny"] * 10_000},
        {"weights": LONG},
        {"weights": torch.zeros(1000)},
        {"layer": LONG},
        {"layer": list(range(10_000))},
        {"pooling": LONG},
        {"image_size": 10**6},
        {"image_shape": tuple(range(10_000))},
        {"device": LONG},
        {"engine": LONG},
        {"random_state": LONG},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_hostile_parameters_give_short_messages(parameters):
    message = message_of(
        lambda: CNNFeatureTransformer(**{"backbone": "tiny", **parameters}).fit(IMAGES)
    )

    assert message


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "maxvit_t"])
def test_networks_that_are_not_supported_yet_are_named(name):
    message = message_of(lambda: CNNFeatureTransformer(name).fit(IMAGES))

    assert f"torchvision's {name!r}" in message
    assert "not supported yet" in message


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (nn.Sequential(nn.ReLU()), "module.named_children()"),
        ([nn.ReLU()], "must be a dictionary of names and modules, got list"),
        ({1: nn.ReLU()}, "must be texts, got 1"),
        ({"a": models.resnet18}, "'a' must be a torch module, got function"),
    ],
    ids=["sequential", "list", "number", "function"],
)
def test_blocks_of_the_wrong_kind_are_refused(blocks, words):
    preprocessing = Preprocessing(16)

    message = message_of(
        lambda: Backbone.from_blocks("own", blocks, preprocessing=preprocessing)
    )

    assert words in message


def test_a_head_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="head must be a torch module or None, got str"):
        Backbone.from_blocks(
            "own", {"a": nn.ReLU()}, "oops", preprocessing=Preprocessing(16)
        )


def test_a_size_that_a_network_refuses_is_told():
    class ForOneSize(nn.Conv2d):
        def forward(self, batch):
            assert batch.shape[-1] == 16, f"size {batch.shape[-1]} {LONG}"
            return super().forward(batch)

    own = Backbone.from_blocks(
        "own", {"a": ForOneSize(3, 4, 3)}, preprocessing=Preprocessing(16)
    )

    message = message_of(lambda: CNNFeatureTransformer(own, image_size=24).fit(IMAGES))

    assert "Images of 24 x 24 pixels cannot cross 'own'" in message


def test_weights_that_overflow_name_the_image():
    huge = nn.Conv2d(3, 4, 3)
    huge.weight.data.fill_(3e38)
    blocks = {"a": huge, "b": nn.Conv2d(4, 4, 3)}
    own = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    transformer = CNNFeatureTransformer(own, precision="float32").fit(IMAGES)

    with pytest.raises(ValueError, match="The features of image 0 are NaN or infinite"):
        transformer.transform(IMAGES + np.uint8(255))
