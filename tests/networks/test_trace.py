"""A traced network computes what the network computes, in any batch, mode and dtype."""

import copy
import operator
import random
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from numpy.testing import assert_allclose
from small_vit import small_vit, small_vit_module
from torch import nn
from torch.nn import functional

from skltl import Backbone, CNNFeatureTransformer, Preprocessing, list_layers
from skltl.exceptions import UnknownLayerError
from skltl.networks import is_known_code, prefix_digests, resolve_layer, skeleton
from skltl.networks._splitting import split
from skltl.networks._trace import trace

SIZE = (16, 16)


class Net(nn.Module):
    """A network whose forward pass is given as a function of the network and images."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, batch):
        return self.run(self, batch)


def conv(n_in, n_out, **options):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


def traced(network, size=SIZE, head=()):
    """Return the blocks of a network by name, and its head as the last of them."""
    blocks, rest = split(trace(network, (3, *size)), network, head)
    blocks |= {} if rest is None else {"head": rest}
    return {name: block.eval() for name, block in blocks.items()}


def run(blocks, batch):
    for block in blocks.values():
        batch = block(batch)
    return batch


def images(n=2, size=SIZE):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(n))


def assert_same(network, n=2, size=SIZE):
    """Assert that the blocks compute the same bits as the network."""
    network.eval()
    blocks = traced(network, size)
    with torch.inference_mode():
        for number in (1, n, 5):
            batch = images(number, size)
            expected = network(batch.clone())
            assert torch.equal(run(blocks, batch.clone()), expected)
    return blocks


def residual(net, batch):
    stem = net.stem(batch)
    hidden = functional.relu(net.second(net.first(stem)) + stem)
    return net.last(hidden)


def test_a_network_is_cut_where_a_single_tensor_is_needed():
    network = Net(residual, stem=conv(3, 4), first=conv(4, 4), second=conv(4, 4))
    network.last = conv(4, 2)

    blocks = assert_same(network)

    assert list(blocks) == ["stem", "add", "relu", "last"]
    keys = [key for block in blocks.values() for key in block.state_dict()]
    assert sorted(keys) == sorted(network.state_dict())


def test_blocks_share_the_weights_of_the_network():
    network = Net(residual, stem=conv(3, 4), first=conv(4, 4), second=conv(4, 4))
    network.last = conv(4, 2)

    blocks = traced(network)

    shared = blocks["add"].get_parameter("first.weight")
    assert shared is network.first.weight


def branches(net, batch):
    return net.last(torch.cat([net.left(batch), net.right(batch)], dim=1))


def test_parallel_branches_are_one_block():
    network = Net(branches, left=conv(3, 2), right=conv(3, 4), last=conv(6, 2))

    assert list(assert_same(network)) == ["cat", "last"]


def with_positions(net, batch):
    """Add a position embedding, sines of a grid, and a learned token."""
    tokens = net.patches(batch).flatten(2).transpose(1, 2)  # (n, t, c)
    n, n_tokens, _ = tokens.shape
    grid = torch.arange(n_tokens, device=batch.device, dtype=batch.dtype)
    waves = torch.sin(grid[:, None] / torch.arange(1, 5))
    tokens = torch.cat([net.token.expand(n, -1, -1), tokens + waves], dim=1)
    for block in (net.first, net.second):
        tokens = tokens + block(tokens + waves.mean(0).to(tokens.dtype))
    return tokens.reshape(n, 17, 2, 2).flatten(2).mean(1)


def vit_like():
    network = Net(with_positions, patches=nn.Conv2d(3, 4, 4, stride=4))
    network.token = nn.Parameter(torch.ones(1, 1, 4))
    network.first, network.second = nn.Linear(4, 4), nn.Linear(4, 4)
    return network


def test_constants_are_computed_once_and_are_no_weights():
    """A value that is handed to every block does not connect the blocks."""
    blocks = assert_same(vit_like())

    assert {"patches", "cat", "add_1", "add_2", "mean"} <= blocks.keys()
    constants = [name for block in blocks.values() for name, _ in block.named_buffers()]
    keys = {key for block in blocks.values() for key in block.state_dict()}
    assert constants
    assert keys == set(vit_like().state_dict())


def test_blocks_run_in_the_dtype_they_are_converted_to():
    network = vit_like().eval()
    blocks = {name: block.bfloat16() for name, block in traced(network).items()}

    with torch.inference_mode():
        found = run(blocks, images().bfloat16())
        expected = copy.deepcopy(network).float()(images())

    assert found.dtype == torch.bfloat16
    assert_allclose(found.float(), expected, rtol=0.1, atol=0.05)


def test_code_may_branch_on_sizes():
    def forward(net, batch):
        hidden = net.first(batch)
        if hidden.shape[-1] > 12:
            hidden = functional.avg_pool2d(hidden, 2)
        return net.second(hidden)

    network = Net(forward, first=conv(3, 4), second=conv(4, 2))

    assert "avg_pool2d" in assert_same(network)
    assert "avg_pool2d" not in assert_same(network, size=(8, 8))


def test_the_order_of_modifications_is_kept():
    def forward(net, batch):
        hidden = net.first(batch)
        view = hidden[:, :2]
        view.add_(1)
        hidden[:, 0] = 0
        hidden = net.relu(hidden)
        return net.second(hidden.mul_(2))

    network = Net(forward, first=conv(3, 4), second=conv(4, 2))
    network.relu = nn.ReLU(inplace=True)

    assert_same(network)


def test_functions_of_weights_may_modify_their_results():
    """As the attention of Swin v2 sets a part of the bias to 0, in a copy."""

    def forward(net, batch):
        hidden = net.first(batch).mean((2, 3))
        bias = net.second.bias.clone()
        bias[1:3].zero_()
        bias[0] = 5
        return net.third(functional.linear(hidden, net.second.weight, bias))

    network = Net(forward, first=conv(3, 4), second=nn.Linear(4, 4))
    network.third = nn.Linear(4, 2)

    blocks = assert_same(network)

    assert "linear" in blocks


def test_a_network_is_not_cut_between_two_uses_of_a_weight():
    """Freezing the first block would freeze a part of the last one."""

    def forward(net, batch):
        hidden = net.second(net.shared(batch))
        return net.last(net.shared(hidden))

    network = Net(forward, shared=conv(3, 3), second=conv(3, 3), last=conv(3, 2))

    blocks = assert_same(network)

    keys = [key for block in blocks.values() for key in block.state_dict()]
    assert list(blocks) == ["shared", "last"]
    assert sorted(keys) == sorted(network.state_dict())


def test_dropout_follows_the_mode():
    def forward(net, batch):
        hidden = functional.dropout(net.first(batch), 0.5, training=net.training)
        return net.second(net.drop(hidden))

    network = Net(forward, first=conv(3, 4), second=conv(4, 2))
    network.drop = nn.Dropout(0.5)
    assert_same(network)
    blocks = traced(network)

    for part in (network, *blocks.values()):
        part.train()
    torch.manual_seed(3)
    expected = network(images())
    torch.manual_seed(3)
    found = run(blocks, images())

    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert not torch.equal(found, network.eval()(images()))


class SometimesDoubled(nn.Module):
    """Does something else in train mode, which no flag of a function tells."""

    def forward(self, batch):
        return batch * 2 if self.training else batch


def test_modules_that_differ_between_the_modes_are_kept_whole():
    network = Net(
        lambda net, batch: net.second(net.odd(net.first(batch))),
        first=conv(3, 4),
        odd=SometimesDoubled(),
        second=conv(4, 2),
    )
    blocks = assert_same(network)

    for part in (network, *blocks.values()):
        part.train()

    assert torch.equal(run(blocks, images()), network(images()))


def test_a_network_that_differs_in_train_mode_is_used_frozen_only():
    def forward(net, batch):
        hidden = net.first(batch)
        return net.second(hidden + 1 if net.training else hidden)

    network = Net(forward, first=conv(3, 4), second=conv(4, 2))

    assert_same(network)
    assert not trace(network, (3, *SIZE)).is_trainable


def test_hooks_of_the_user_are_kept():
    network = nn.Sequential(OrderedDict(first=conv(3, 4), second=conv(4, 2)))
    network.first.register_forward_hook(lambda module, args, output: output * 3)

    assert_same(network)


def test_a_module_that_is_called_twice_is_named_by_its_last_call():
    network = Net(
        lambda net, batch: net.act(net.second(net.act(net.first(batch)))),
        first=conv(3, 4),
        second=conv(4, 2),
        act=nn.ReLU(),
    )

    assert list(assert_same(network)) == ["first", "act_1", "second", "act"]


def test_nested_outputs_are_unpacked():
    network = Net(
        lambda net, batch: net.last(net.lstm(batch.flatten(2).transpose(1, 2))[0]),
        lstm=nn.LSTM(3, 5, batch_first=True),
        last=nn.Linear(5, 2),
    )

    assert_same(network, size=(4, 4))


def test_attention_of_torch_has_the_same_bits():
    network = Net(
        lambda net, batch: net.attention(*[net.tokens(batch)] * 3)[0].mean(1),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    network.tokens = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
    network.tokens.append(nn.Unflatten(2, (16,)))
    network.run = lambda net, batch: net.attention(
        *[net.tokens(batch).transpose(1, 2)] * 3
    )[0].mean(1)

    assert_same(network)


def small_backbone(forward, name="own", **children):
    return Backbone.from_module(
        name, Net(forward, **children), preprocessing=Preprocessing(16)
    )


def modify_weights(net, batch):
    net.first.weight.data.add_(1)
    return net.first(batch)


def replace_weights(net, batch):
    with torch.no_grad():
        net.first.bias.add_(1)
    return net.first(batch)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda net, x: net.first(x) if x.sum() > 0 else x, "values of pixels"),
        (lambda net, x: (net.first(x), x), "it returns a tuple, and not one tensor"),
        (lambda net, x: net.first(x) * 1.5 ** len(x), "depends on the number of im"),
        (lambda net, x: net.first(x) * len(x) ** 2, "do not compute what it computes"),
        (modify_weights, "it modifies weights or constants"),
        (replace_weights, "it modifies weights or constants"),
        (lambda net, x: net.first(x) + torch.rand(16), "do not compute what"),
    ],
    ids=["pixels", "tuple", "batch", "batch squared", "data", "weights", "random"],
)
def test_what_cannot_be_traced_is_refused(forward, words):
    with pytest.raises(ValueError, match=f"'own' cannot be traced.*{words}"):
        small_backbone(forward, first=conv(3, 4))


def test_a_network_is_traced_once_for_each_size(shared_images):
    """Its own code runs no more once it is split into blocks."""
    n_runs = 0

    def counted(net, batch):
        nonlocal n_runs
        n_runs += 1
        return net.second(net.first(batch))

    backbone = small_backbone(counted, first=conv(3, 4), second=conv(4, 5))
    settings = {"backbone": backbone, "precision": "float32"}
    features = CNNFeatureTransformer(**settings).fit_transform(shared_images)
    assert n_runs > 0
    n_runs = 0

    again = CNNFeatureTransformer(**settings, layer=["first", "second"])

    assert_allclose(again.fit_transform(shared_images)[:, 4:], features, rtol=1e-6)
    assert n_runs == 0
    CNNFeatureTransformer(**settings, image_size=24).fit(shared_images)
    assert n_runs > 0


def test_other_threads_run_networks_during_a_trace():
    """Nothing is replaced in torch while a network is traced."""
    network = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)).eval()
    expected = network(images()).detach()
    deep = nn.Sequential(*(conv(3, 3) for _ in range(60)))
    errors, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                torch.testing.assert_close(network(images()).detach(), expected)
            except AssertionError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    blocks = [traced(deep) for _ in range(5)]
    stop.set()
    for thread in threads:
        thread.join()

    assert not errors
    assert all(len(one) == 60 for one in blocks)


def test_a_trace_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), random.getstate()

    small_vit(small_vit_module())

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_traced_code_of_the_user_is_identified_by_its_calls():
    """Equal networks have equal digests, in whichever class they are written."""

    def first(net, batch):
        return net.conv(batch).relu() * 2

    def second(net, batch):
        hidden = net.conv(batch)
        return hidden.relu() * 2

    def other(net, batch):
        return net.conv(batch).relu() * 3

    digests = []
    for forward in (first, second, other):
        torch.manual_seed(0)
        backbone = small_backbone(forward, conv=conv(3, 4))
        blocks = skeleton(backbone, SIZE).blocks
        assert all(map(is_known_code, blocks.values()))
        digests.append(prefix_digests(backbone, blocks)[list(blocks)[-1]])

    assert digests[0] == digests[1] != digests[2]


@pytest.fixture(scope="module")
def own_operators():
    """The operators of a library of the user."""

    @torch.library.custom_op("skltl_tests::halve", mutates_args=())
    def halve(batch: torch.Tensor) -> torch.Tensor:
        return batch / 2

    @halve.register_fake
    def _(batch):
        return torch.empty_like(batch)

    return torch.ops.skltl_tests


def test_scripted_functions_are_refused():
    def double(batch: torch.Tensor) -> torch.Tensor:
        return batch * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(double)

    with pytest.raises(ValueError, match="a function of TorchScript"):
        small_backbone(lambda net, batch: scripted(net.first(batch)), first=conv(3, 4))


@pytest.mark.parametrize("name", ["halve", "halve.default"])
def test_operators_of_other_libraries_are_unknown_code(own_operators, name):
    halve = operator.attrgetter(name)(own_operators)
    backbone = small_backbone(
        lambda net, batch: halve(net.first(batch)), first=conv(3, 4)
    )

    first, last = skeleton(backbone, SIZE).blocks.values()

    assert is_known_code(first)
    assert not is_known_code(last)


def shrinking():
    """A network of which small images reach the first blocks only."""
    stem = nn.Conv2d(3, 4, 3, stride=2)
    parts = [stem, nn.MaxPool2d(3), nn.Conv2d(4, 4, 3), nn.Flatten()]
    names = ("stem", "pool", "conv", "flat")
    network = nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
    return Backbone.from_module("small", network, preprocessing=Preprocessing(32))


def test_small_images_reach_the_first_layers(shared_images):
    backbone = shrinking()

    small = CNNFeatureTransformer(backbone, layer="pool", image_size=8)
    found = small.fit_transform(shared_images)

    assert found.shape == (9, 4)
    assert list(skeleton(backbone, (8, 8)).layouts) == ["stem", "pool"]
    with pytest.raises(ValueError, match="8 x 8 pixels cannot pass through 'small'"):
        small.set_params(layer="conv").fit(shared_images)
    with pytest.raises(ValueError, match="2 x 2 .*It takes images of 32 x 32 pixels"):
        small.set_params(layer="stem", image_size=2).fit(shared_images)


def test_layers_inside_of_a_block_name_the_nearest_ones():
    backbone = small_vit()

    inside = "encoder.layers.encoder_layer_1.ln_2"
    with pytest.raises(UnknownLayerError, match="The nearest layers are .*layer_1'"):
        resolve_layer(backbone, inside)
    paths = [layer.path for layer in list_layers(backbone)]
    assert [resolve_layer(backbone, path).block for path in paths] == paths
