"""Invalid parameters are refused with a short message that says what to do."""

import os
from concurrent.futures import ThreadPoolExecutor

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
    StrategyAdvisor,
    TransferClassifier,
    recommend_strategy,
    register_backbone,
)
from skltl.exceptions import ImageReadError, WeightsNotFoundError

IMAGES = np.zeros((4, 16, 16, 3), np.uint8)
LABELS = [0, 1, 0, 1]
ESTIMATORS = [CNNFeatureTransformer, PretrainedCNNClassifier, FineTunedCNNClassifier]
LONG = "x" * 100_000
HUGE = CNNFeatureTransformer("tiny", image_size=10**6)


@pytest.fixture(scope="module")
def network():
    """A network of torchvision that draws its weights quickly."""
    return models.squeezenet1_1(weights=None)


def message_of(call):
    """Return the message of the error that a call raises, and check its length."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert len(text) <= 500
    return text


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_module_as_backbone_is_refused_with_an_alternative(estimator, network):
    message = message_of(lambda: estimator(network).fit(IMAGES, LABELS))

    assert "SqueezeNet" in message
    assert "skltl.Backbone.from_" in message


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_state_dict_as_weights_is_refused_with_an_alternative(estimator, network):
    state = network.state_dict()

    message = message_of(
        lambda: estimator("squeezenet1_1", weights=state).fit(IMAGES, LABELS)
    )

    assert "state dict" in message
    assert "torch.save(state_dict" in message


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
def test_huge_parameters_give_short_messages(parameters):
    (name,) = parameters
    transformer = CNNFeatureTransformer(**{"backbone": "tiny", **parameters})
    X = IMAGES.reshape(4, -1) if name == "image_shape" else IMAGES

    message = message_of(lambda: transformer.fit(X))

    assert name in message


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "raft_small", "r3d_18"])
def test_networks_for_other_tasks_are_named(name):
    message = message_of(lambda: CNNFeatureTransformer(name).fit(IMAGES))

    assert repr(name) in message
    assert "not a network for image classification" in message


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (nn.Sequential(nn.ReLU()), "module.named_children()"),
        ([nn.ReLU()], "must be a dictionary of names and modules, got a list"),
        ({1: nn.ReLU()}, "must be strings, got 1"),
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


def test_a_head_that_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match="head must be .* got str"):
        Backbone.from_blocks(
            "own", {"a": nn.ReLU()}, "oops", preprocessing=Preprocessing(16)
        )


def test_an_image_size_that_a_network_refuses_is_named():
    class ForOneSize(nn.Conv2d):
        def forward(self, batch):
            assert batch.shape[-1] == 16, f"size {batch.shape[-1]} {LONG}"
            return super().forward(batch)

    own = Backbone.from_blocks(
        "own", {"a": ForOneSize(3, 4, 3)}, preprocessing=Preprocessing(16)
    )

    message = message_of(lambda: CNNFeatureTransformer(own, image_size=24).fit(IMAGES))

    assert "24 x 24" in message
    assert "'own'" in message


def test_weights_that_overflow_name_the_image():
    huge = nn.Conv2d(3, 4, 3)
    huge.weight.data.fill_(3e38)
    blocks = {"a": huge, "b": nn.Conv2d(4, 4, 3)}
    own = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    transformer = CNNFeatureTransformer(own, precision="float32").fit(IMAGES)

    with pytest.raises(ValueError, match=r"\bimage 0\b.*\bNaN or infinite"):
        transformer.transform(IMAGES + np.uint8(255))


@pytest.mark.parametrize(
    "call",
    [
        lambda: register_backbone("x"),
        lambda: Backbone.from_blocks("own", {}, preprocessing=Preprocessing(16)),
        lambda: Preprocessing("224"),
        lambda: Preprocessing(22.5),
        lambda: Preprocessing(True),
        lambda: Preprocessing(float("nan")),
        lambda: Preprocessing(16, mean=0.5),
        lambda: Preprocessing(16, mean=LONG),
        lambda: Preprocessing(16, interpolation=["x"]),
        lambda: Preprocessing(16, interpolation=LONG),
        lambda: recommend_strategy(100, 10, LONG),
        lambda: recommend_strategy(100, 10, "similar", n_smallest=-5),
        lambda: recommend_strategy(100, 10, "similar", n_smallest="many"),
        lambda: CNNFeatureTransformer("tiny", n_jobs=0).fit_transform(IMAGES),
        lambda: CNNFeatureTransformer("tiny", layer=[1.5] * 400).fit(IMAGES),
        lambda: TransferClassifier(HUGE).fit(IMAGES, LABELS),
        lambda: StrategyAdvisor(HUGE).fit(IMAGES, LABELS),
        lambda: TransferClassifier(LONG).fit(IMAGES, LABELS),
        lambda: StrategyAdvisor(LONG).fit(IMAGES, LABELS),
        lambda: CNNFeatureTransformer("tiny", layer=["x"] * 400).fit(IMAGES),
        lambda: CNNFeatureTransformer("tiny", weights=LONG + ".pt").fit(IMAGES),
        lambda: CNNFeatureTransformer("tiny").fit(np.array([b"a.png", b"b.png"])),
        lambda: CNNFeatureTransformer("tiny", image_shape=(True, 9)).fit([[0.0] * 9]),
        *(
            lambda folder=folder: FineTunedCNNClassifier("tiny", checkpoint=folder).fit(
                IMAGES, LABELS
            )
            for folder in ("", "a\0b")
        ),
        *(
            lambda class_map=class_map: PretrainedCNNClassifier(
                "tiny", class_map=class_map
            ).fit(IMAGES)
            for class_map in (
                {"dog": list(range(190))},
                {"dog": LONG, "cat": 1},
                {LONG: 10**9, "cat": 1},
                {LONG: [], "cat": 1},
                {LONG: None, "cat": 1},
                dict.fromkeys([*range(10_000), "a"], 1),
            )
        ),
    ],
)
def test_invalid_parameters_give_readable_messages(call):
    message = message_of(call)

    for internal in ("has no attribute", "expected str", "not iterable", "null byte"):
        assert internal not in message


def test_a_long_name_in_a_weights_file_gives_a_short_message(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({LONG: 1}, path)

    message = message_of(
        lambda: CNNFeatureTransformer("tiny", weights=path).fit(IMAGES)
    )

    assert "weights.pt" in message
    assert "state dict" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("role", ["image", "weights"])
def test_named_pipes_do_not_block(tmp_path, role):
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    made = FineTunedCNNClassifier("tiny", image_size=32, checkpoint=tmp_path / "fit")
    images = [pipe] * 4 if role == "image" else IMAGES
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(
            made.set_params(weights=pipe if role == "weights" else "pretrained").fit,
            *(images, LABELS),
        )
        try:
            error = fit.exception(timeout=60)
        finally:
            if not fit.done():  # otherwise the thread would never end
                os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))

    assert isinstance(error, (ImageReadError, WeightsNotFoundError))
