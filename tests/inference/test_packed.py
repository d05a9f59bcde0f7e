"""Packed convolutions compute what plain ones do, whatever their kind."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn
from torch.testing import assert_close

from skltl import Backbone, CNNFeatureTransformer, Preprocessing
from skltl.inference._packed import PackedConv2d, pack_convolutions

KINDS = {
    "square": {"kernel_size": 3, "padding": 1},
    "of one pixel, every second": {"kernel_size": 1, "stride": 2},
    "by channel, without bias": {
        "kernel_size": 3,
        "groups": 16,
        "out_channels": 16,
        "bias": False,
    },
    "in groups, dilated": {"kernel_size": 3, "groups": 4, "dilation": 2},
    "oblong": {"kernel_size": (1, 7), "padding": (0, 3)},
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def convolution(**settings):
    torch.manual_seed(0)
    kind = {"in_channels": 16, "out_channels": 24, **settings}
    return nn.Conv2d(**kind).eval().requires_grad_(False)


def packed(module):
    module = copy.deepcopy(module)
    pack_convolutions(module)
    return module


def maps(n, dtype):
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(n, 16, 20, 20, generator=generator).to(dtype)
    return batch.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_convolutions_compute_convolutions(kind, dtype):
    plain = convolution(**KINDS[kind]).to(dtype, memory_format=torch.channels_last)
    fast = packed(plain)

    assert type(fast) is PackedConv2d
    for n in (4, 1, 9):  # packed for the first, used for all
        exact = plain.double()(maps(n, dtype).double())
        found = fast(maps(n, dtype)).double()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        assert_close(found, exact, rtol=tolerance, atol=tolerance)
        plain.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_for_which_weights_were_packed_does_not_matter(kind, dtype):
    plain = convolution(**KINDS[kind]).to(dtype, memory_format=torch.channels_last)
    batches = [maps(n, dtype)[:, :, :size, :size] for n, size in ((8, 20), (1, 9))]
    first_large, first_small = packed(plain), packed(plain)

    large, small = map(first_large, batches)

    small_again, large_again = map(first_small, reversed(batches))
    assert torch.equal(small, small_again)
    assert torch.equal(large, large_again)


def test_packing_stands_aside_where_onednn_is_off():
    plain = convolution(**KINDS["square"])
    fast = packed(plain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(fast(maps(4, torch.float32)), plain(maps(4, torch.float32)))
        assert fast._packed is None


@pytest.mark.parametrize(
    "conv",
    [
        convolution(kernel_size=3, padding=1, padding_mode="reflect"),
        convolution(kernel_size=3, padding="same"),
        nn.utils.parametrizations.weight_norm(convolution(kernel_size=3)),
        nn.ConvTranspose2d(16, 24, 3).eval().requires_grad_(False),
    ],
    ids=["reflecting", "same", "parametrized", "transposed"],
)
def test_what_cannot_be_packed_stays_as_it_is(conv):
    batch = maps(2, torch.float32)
    expected = conv(batch)

    pack_convolutions(conv)

    assert not isinstance(conv, PackedConv2d)
    assert torch.equal(conv(batch), expected)


class Twice(nn.Module):
    """Code of the user's own, which is not looked into."""

    def forward(self, batch):
        return 2 * batch


@pytest.mark.parametrize("with_cache", [False, True])
def test_other_cuts_change_no_bit_before_own_code(with_cache, images, tmp_path):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1)]
    blocks = {"a": nn.Sequential(*first), "own": Twice(), "b": nn.Conv2d(64, 32, 1)}
    # So small that torch by itself would not use oneDNN.
    backbone = Backbone.from_blocks("twice", blocks, preprocessing=Preprocessing(16))
    settings = {"device": "cpu", "precision": "float32", "engine": "torch"}
    transformer = CNNFeatureTransformer(backbone, batch_size=1, layer="b", **settings)
    alone = transformer.fit_transform(images)

    transformer.set_params(cache=tmp_path if with_cache else None)
    both = transformer.set_params(layer=["a", "b"]).fit_transform(images)

    assert_array_equal(both[:, 64:], alone)
    assert_array_equal(transformer.set_params(layer="b").fit_transform(images), alone)


def test_bfloat16_runs_where_onednn_cannot_multiply_it():
    code = """
import numpy as np
from skltl import CNNFeatureTransformer
tiny = CNNFeatureTransformer("tiny", precision="bfloat16", engine="torch", device="cpu")
features = tiny.fit_transform(np.full((2, 48, 48, 3), 99, dtype=np.uint8))
assert np.isfinite(features).all() and features.any()
"""
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=True,
        timeout=120,
    )


class Growing(nn.Module):
    """Code of the user's own that changes a convolution's weights as it runs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.n_calls = 0

    def forward(self, batch):
        self.n_calls += 1
        self.conv.weight.data.fill_(self.n_calls)
        return self.conv(batch)


def test_weights_that_own_code_changes_are_used(images):
    preprocessing = Preprocessing(16, mean=(0, 0, 0), std=(1, 1, 1))
    blocks = {"one": Growing()}
    backbone = Backbone.from_blocks("growing", blocks, preprocessing=preprocessing)
    fitted = CNNFeatureTransformer(backbone, device="cpu", precision="float32").fit(
        images
    )

    first, second = fitted.transform(images), fitted.transform(images)

    calls = torch.from_numpy(second / first).mean()
    assert calls > 1.1  # by two calls of one batch each, at least
