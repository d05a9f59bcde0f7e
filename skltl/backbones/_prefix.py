"""The frozen prefix of a network, made ready to run fast."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.googlenet import BasicConv2d as GoogLeNetUnit
from torchvision.models.inception import BasicConv2d as InceptionUnit
from torchvision.models.resnet import BasicBlock, Bottleneck

from skltl._locks import Lock
from skltl.backbones._blocks import children_of, cut, freeze, has_hooks
from skltl.backbones._engines import ends_of_segments, prepare_engine
from skltl.backbones._under_way import send
from skltl.images import normalise

# What modules do that run each batch-norm right behind the convolution defined before
# it. Of a module with another `forward`, subclasses of these included, the order is
# not known.
RUN_IN_ORDER = {
    kind.forward
    for kind in (nn.Sequential, BasicBlock, Bottleneck, GoogLeNetUnit, InceptionUnit)
}

# Each is a copy of the network, and lives as long as the prefix.
MAX_RUNNERS = 2

Pool = Callable[[Tensor], Tensor]

_prefixes: WeakSet[FrozenPrefix] = WeakSet()


def forget_runners() -> None:
    """Forget the runners of all prefixes; they are prepared again when needed."""
    for prefix in list(_prefixes):
        prefix.forget_runners()


class FrozenPrefix:
    """The first blocks of a network as a fixed function of pictures.

    Parameters
    ----------
    blocks : mapping of str to Module
        Never changed. They become frozen, and are shared by all estimators that use the
        same network.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        freeze(blocks)
        self.blocks = blocks
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()
        self._lock = Lock()
        _prefixes.add(self)

    def __deepcopy__(self, memo: object) -> FrozenPrefix:
        return self  # never changed: a copy of an estimator may share it

    def runner(
        self,
        device: torch.device,
        dtype: torch.dtype,
        wanted: Sequence[str],
        engine: str = "torch",
        mains: Sequence[str] = (),
    ) -> Runner:
        """Return the prefix made ready for a device and some of its blocks.

        It is prepared once for the same arguments, as long as it was used lately. See
        `Runner` for these.
        """
        key = (device, dtype, tuple(wanted), engine)
        with self._lock:
            runner = self._runners.pop(key, None)
            if runner is None:
                blocks = cut(self.blocks, wanted)
                runner = Runner(blocks, wanted, device, dtype, engine, mains)
            self._runners[key] = runner
            if len(self._runners) > MAX_RUNNERS:
                self._runners.popitem(last=False)
            return runner

    def forget_runners(self) -> None:
        """Forget what has been prepared."""
        with self._lock:
            self._runners.clear()


class Runner:
    """A frozen prefix on its device: batch-norms folded, channels last, in one dtype.

    Parameters
    ----------
    blocks : mapping of str to Module
        Frozen; they are copied.
    wanted : sequence of str
        The blocks after which features are taken.
    device : torch.device
        Where to run.
    dtype : torch.dtype
        What to compute in.
    engine : {"torch", "compile", "openvino"}, default="torch"
        What runs it.
    mains : sequence of str, default=()
        The blocks behind which main cut points lie.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        wanted: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "torch",
        mains: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._wanted = wanted
        ends = ends_of_segments(list(blocks), wanted, mains, engine)
        segments = {
            name: _prepared(segment, device, dtype)
            for name, segment in _segments(blocks, ends)
        }
        self._engine = prepare_engine(engine, segments, wanted, dtype)
        self._input_dtype = torch.float32 if engine == "openvino" else dtype

    def features(self, pixels: Tensor, mean: Tensor, std: Tensor, pool: Pool) -> Tensor:
        """Run a batch of pictures, and pool at each wanted place.

        Parameters
        ----------
        pixels : tensor of shape (n, h, w, 3)
            uint8, or float32; on the CPU or the device.
        mean, std : tensor of shape (3, 1, 1)
            Of the preprocessing, float32; on the device.
        pool : callable
            From a feature map (n, c, h, w) or vectors (n, d)
            to features (n, d), float32.

        Returns
        -------
        tensor of shape (n, d)
            The features of all wanted places, side by side, float32, on the device. A
            GPU may still be computing them.
        """
        # The user's autocast would overrule the precision that was asked for.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
        ):
            return self._run(pixels, mean, std, pool)

    def _run(self, pixels: Tensor, mean: Tensor, std: Tensor, pool: Pool) -> Tensor:
        # Pictures lie in memory with their channels last:
        # this permutation copies nothing.
        batch = send(pixels, self.device).permute(0, 3, 1, 2)  # (n, 3, h, w)
        batch = normalise(batch, mean, std)
        batch = batch.to(self._input_dtype, memory_format=torch.channels_last)
        pooled = dict(self._engine(batch, pool))
        return torch.cat([pooled[name] for name in self._wanted], dim=1)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch-norm into the convolution before it, in place.

    In evaluation mode a batch-norm is a multiplication and an addition per channel,
    which the convolution's own weights can do.
    """
    for child in module.children():
        fold_batch_norms(child)
    if type(module).forward not in RUN_IN_ORDER:
        return
    for (first, conv), (second, norm) in pairwise(children_of(module)):
        if (
            type(conv) is nn.Conv2d
            and type(norm) is nn.BatchNorm2d
            and not (has_hooks(conv) or has_hooks(norm))
        ):
            setattr(module, first, fuse_conv_bn_eval(conv, norm))
            setattr(module, second, nn.Identity())


def parts_a_fold(blocks: Mapping[str, nn.Module], name: str) -> bool:
    """Tell whether a cut after a block parts a convolution from its batch-norm.

    Then the one is not folded into the other, which changes the last digits of all that
    follows.
    """
    names = list(blocks)
    following = names[names.index(name) + 1 :][:1]
    return type(blocks[name]) is nn.Conv2d and any(
        type(blocks[next_name]) is nn.BatchNorm2d for next_name in following
    )


def _segments(
    blocks: Mapping[str, nn.Module], wanted: Sequence[str]
) -> list[tuple[str, nn.Sequential]]:
    """Group the blocks between the wanted places."""
    segments: list[tuple[str, nn.Sequential]] = []
    segment = nn.Sequential()
    for name, block in blocks.items():
        segment.append(copy.deepcopy(block))
        if name in wanted:
            segments.append((name, segment))
            segment = nn.Sequential()
    return segments


def _prepared(
    segment: nn.Sequential, device: torch.device, dtype: torch.dtype
) -> nn.Sequential:
    fold_batch_norms(segment)
    freeze({"segment": segment})  # the folded convolutions are new
    # torch's annotations of `Module.to` leave out `memory_format`.
    segment.to(  # type: ignore[call-overload]
        device, dtype, memory_format=torch.channels_last
    )
    return segment
