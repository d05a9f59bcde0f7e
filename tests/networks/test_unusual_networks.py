"""Networks with unusual code: their features are right, or they are refused."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small_vit import small_vit
from torch import nn
from torch.nn import functional

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    list_layers,
)

PREPROCESSING = Preprocessing(16, mean=(0,) * 3, std=(1,) * 3)


class Net(nn.Module):
    """Two convolutions with something unusual between them."""

    def __init__(self, unusual, **children):
        super().__init__()
        self.unusual = unusual
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, batch):
        return self.second(self.unusual(self, self.first(batch)))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def backbone_of(network, **parameters):
    return Backbone.from_module(
        "unusual", network, preprocessing=PREPROCESSING, **parameters
    )


def batch_of(images):
    batch = torch.tensor(images / 255, dtype=torch.float32)
    return batch.permute(0, 3, 1, 2).contiguous()


def numpy_numbers(net, hidden):
    shape = (len(hidden), np.int64(4), 16, 16)
    return hidden.reshape(shape) / np.sqrt(32) * np.float32(2)


def padding_by_assignment(net, hidden):
    padded = torch.zeros(len(hidden), 4, 20, 20)
    padded[:, :, 2:-2, 2:-2] = hidden
    return padded


def constant_modified(net, hidden):
    gain = torch.zeros(1, 4, 1, 1)
    gain.add_(hidden.new_ones(()))
    return hidden * gain


def view_modified(net, hidden):
    flat = hidden.view(len(hidden), -1)
    flat.sub_(flat.amin(1, keepdim=True))
    return hidden


def flattened_view_modified(net, hidden):
    hidden.flatten(1).mul_(3)
    return hidden


def cast_to_float(net, hidden):
    return net.second.bias[:1].float() * hidden.float()


def masked(net, hidden):
    least = torch.finfo(hidden.dtype).min
    scores = hidden.flatten(2).masked_fill(torch.arange(256) > 200, least)
    return hidden * scores.softmax(-1).amax(-1)[..., None, None]


def nan_replaced(net, hidden):
    return hidden.masked_fill(hidden < 0, float("nan")).nan_to_num(0.5)


def complex_product(net, hidden):
    spectrum = torch.fft.rfft2(hidden) * net.gain
    return torch.fft.irfft2(spectrum, s=hidden.shape[-2:])


def complex_view(net, hidden):
    return hidden * torch.view_as_complex(net.pairs).abs()


def bits_of_view(net, hidden):
    return hidden.contiguous().view(torch.int32).view(torch.float32) * 2


def constant_beside_a_parameter(net, hidden):
    return hidden * net.constant_0 + torch.arange(16.0)


def keyword_argument(net, hidden):
    return net.norm(input=hidden)


def auxiliary_output(net, hidden):
    net.auxiliary(hidden)
    return hidden


def identity_norm():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(3)
    norm.forward = lambda batch: batch
    return norm


UNUSUAL = [
    *((one, {}) for one in (numpy_numbers, padding_by_assignment, constant_modified)),
    *((one, {}) for one in (view_modified, flattened_view_modified, cast_to_float)),
    *((one, {}) for one in (masked, nan_replaced, bits_of_view)),
    (complex_product, {"gain": torch.randn(4, 16, 9, dtype=torch.complex64)}),
    (complex_view, {"pairs": torch.randn(4, 16, 16, 2)}),
    (constant_beside_a_parameter, {"constant_0": torch.full((1,), 2.0)}),
    (keyword_argument, {"norm": nn.BatchNorm2d(4).eval()}),
    (lambda net, hidden: net.norm(hidden), {"norm": identity_norm()}),
    (auxiliary_output, {"auxiliary": nn.Conv2d(4, 2, 1)}),
]


@pytest.mark.parametrize(("unusual", "children"), UNUSUAL)
def test_features_are_those_of_the_network(unusual, children, images):
    """In batches of any size, channels last, and in a second call."""
    weights = {
        name: nn.Parameter(child) if isinstance(child, torch.Tensor) else child
        for name, child in children.items()
    }
    network = Net(unusual, **weights).eval()
    with torch.inference_mode():
        expected = network(batch_of(images)).mean((2, 3)).numpy()

    for batch_size in (1, 2, 5):
        transformer = CNNFeatureTransformer(
            backbone_of(network),
            batch_size=batch_size,
            precision="float32",
            engine="torch",
            device="cpu",
        )
        for _ in range(2):
            found = transformer.fit_transform(images)
            assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


class Rounding(torch.autograd.Function):
    """Straight-through estimator: its gradient is that of the identity."""

    @staticmethod
    def forward(ctx, batch):
        return batch.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without_gradients(net, hidden):
    with torch.no_grad():
        return net.middle(hidden)


@pytest.mark.parametrize(
    "unusual",
    [
        lambda net, hidden: Rounding.apply(hidden),
        without_gradients,
        lambda net, hidden: hidden.clamp(-1, 0.1 if net.training else None),
        lambda net, hidden: (net.middle if net.training else net.other)(hidden),
    ],
    ids=["own gradient", "no gradient", "argument by mode", "layer by mode"],
)
def test_networks_with_other_gradients_are_used_frozen_only(unusual, images):
    layers = {"middle": nn.Conv2d(4, 4, 1), "other": nn.Conv2d(4, 4, 1)}
    network = Net(unusual, **layers).eval()
    backbone = backbone_of(network)

    features = CNNFeatureTransformer(backbone, precision="float32").fit_transform(
        images
    )

    with torch.inference_mode():
        expected = network(batch_of(images)).mean((2, 3)).numpy()
    assert_allclose(features, expected, rtol=0, atol=1e-5)
    tuned = FineTunedCNNClassifier(backbone, unfreeze="all", random_state=0)
    with pytest.raises(ValueError, match="'unusual' can only be used frozen"):
        tuned.fit(images, [0, 0, 1, 1, 1])


def test_outputs_in_train_mode_may_be_others(images):
    class WithAuxiliary(Net):
        def forward(self, batch):
            hidden = self.first(batch)
            outputs = self.second(hidden), self.third(hidden)
            return outputs if self.training else outputs[0]

    backbone = backbone_of(WithAuxiliary(None, third=nn.Conv2d(4, 2, 1)))

    features = CNNFeatureTransformer(backbone).fit_transform(images)

    assert features.shape == (5, 5)
    assert [layer.name for layer in list_layers(backbone)] == ["first", "second"]


@pytest.mark.parametrize(
    "unusual",
    [
        lambda net, hidden: hidden - hidden.mean(0),
        lambda net, hidden: hidden * min(len(hidden), 4),
        lambda net, hidden: functional.batch_norm(hidden, None, None, training=True),
    ],
    ids=["mean", "number", "batch norm"],
)
def test_features_that_depend_on_other_images_are_refused(unusual):
    with pytest.raises(ValueError, match="the other images|do not compute what it"):
        backbone_of(Net(unusual))


def own_weight_norm():
    layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 1))
    layer(torch.ones(1, 3, 2, 2)).sum().backward()
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make_network", "parameters", "words"),
    [
        (lambda: nn.ModuleDict({"class": nn.Conv2d(3, 4, 1)}), {}, "'class'.*keyword"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), {}, r"'0\.weight'.*no values"),
        (lambda: nn.Conv2d(3, 4, 1, device="meta"), {}, "'weight'.*no values"),
        (own_weight_norm, {}, "torch.nn.utils.parametrizations"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), {"layers": {}}, "layers is empty"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Softmax(1)),
            {"head": "2"},
            "head='2' has no weights that the forward pass uses",
        ),
        (
            lambda: Net(lambda net, hidden: hidden, fc=nn.Linear(3, 2)),
            {"head": "fc"},
            "head='fc' has no weights that the forward pass uses",
        ),
    ],
)
def test_networks_are_refused_with_a_reason(make_network, parameters, words):
    with pytest.raises(ValueError, match=words):
        backbone_of(make_network(), **parameters)


def test_outputs_of_another_type_are_refused():
    class Doubled(Net):
        def forward(self, batch):
            return self.second(self.first(batch)).double()

    with pytest.raises(ValueError, match=r"values of the type torch\.float64"):
        backbone_of(Doubled(None))


def test_names_of_timm_are_refused():
    with pytest.raises(ValueError, match="'timm:mine'.*are timm's"):
        Backbone.from_module(
            "timm:mine", nn.Conv2d(3, 4, 1), preprocessing=PREPROCESSING
        )


def test_joined_rows_of_a_feature_map_keep_their_channels(images):
    """16 channels of 4 x 4 positions look like 16 tokens."""
    network = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2))

    features = CNNFeatureTransformer(
        backbone_of(network), precision="float32"
    ).fit_transform(images)

    with torch.inference_mode():
        expected = network(batch_of(images)).mean(2)
    assert_allclose(features, expected, rtol=0, atol=1e-6)


def test_layers_are_in_the_order_of_the_forward_pass(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3))
    backbone = backbone_of(network, layers={"top": "1", "stem": "0"})

    assert [layer.name for layer in list_layers(backbone)] == ["stem", "top"]
    assert CNNFeatureTransformer(backbone).fit_transform(images).shape == (5, 6)


def test_the_output_of_a_network_without_a_head_is_a_layer(images):
    class Ending(Net):
        def forward(self, batch):
            return self.second(self.first(batch)).add_(100)

    features = CNNFeatureTransformer(backbone_of(Ending(None))).fit_transform(images)

    assert features.min() > 90


def test_convolutions_in_the_head_have_no_class_token():
    images = np.zeros((6, 32, 32, 3), np.uint8)
    for pooling in ("cls", "cls+avg"):
        classifier = FineTunedCNNClassifier(
            small_vit(), conv_channels=(8,), pooling=pooling
        )
        with pytest.raises(ValueError, match="conv_channels=.*which has none"):
            classifier.fit(images, [0, 1] * 3)


def test_equal_sizes_are_the_same_size():
    assert Preprocessing((16, 16)) == Preprocessing([16, 16]) == Preprocessing(16)
    assert_array_equal(Preprocessing((16, 8)).size, (16, 8))
