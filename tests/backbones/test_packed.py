"""Packed convolutions compute what plain ones do, whatever their kind."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from skltl import Backbone, CNNFeatureTransformer, Preprocessing
from skltl.backbones._packed import PackedConv2d, pack_convolutions

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
def test_packing_changes_no_product(kind, dtype):
    plain = convolution(**KINDS[kind]).to(dtype, memory_format=torch.channels_last)
    fast = packed(plain)

    assert type(fast) is PackedConv2d
    for n in (4, 1, 9):  # packed for the first, used for all
        exact = plain.double()(maps(n, dtype).double())
        found = fast(maps(n, dtype)).double()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        assert_close(found, exact, rtol=tolerance, atol=tolerance)
        plain.to(dtype)


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


def test_weights_that_own_code_changes_are_used(pictures):
    preprocessing = Preprocessing(16, mean=(0, 0, 0), std=(1, 1, 1))
    blocks = {"one": Growing()}
    backbone = Backbone.from_blocks("growing", blocks, preprocessing=preprocessing)
    fitted = CNNFeatureTransformer(backbone, device="cpu", precision="float32").fit(
        pictures
    )

    first, second = fitted.transform(pictures), fitted.transform(pictures)

    calls = torch.from_numpy(second / first).mean()
    assert calls > 1.1  # by two calls of one batch each, at least
