"""The network in training: frozen blocks, trainable blocks and a head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl._random import as_int, derived_seed, own_random_state, torch_defaults
from skltl.exceptions import UnknownLayerError
from skltl.inference import TOKEN_POOLINGS, FrozenPrefix, as_tensor, n_pooled, pool
from skltl.networks import (
    Backbone,
    Block,
    ImageSize,
    Layout,
    ResolvedLayer,
    freeze,
    resolve_layer,
    skeleton,
)


class Pool(nn.Module):
    """Pool outputs of a layout to features (n, d), which pass unchanged."""

    def __init__(self, pooling: str | int, layout: Layout) -> None:
        super().__init__()
        self.pooling = pooling
        self.layout = layout

    def forward(self, output: Tensor) -> Tensor:
        """Return the features (n, d)."""
        if output.ndim == 2:
            return output
        return pool(output, self.pooling, self.layout).to(output.dtype)


class AsMap(nn.Module):
    """Arrange outputs of a layout as feature maps (n, c, h, w)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, output: Tensor) -> Tensor:
        """Return the feature maps."""
        return self.layout.as_map(output)


class Standardize(nn.Module):
    """Scale each feature to mean 0 and standard deviation 1 on the training images.

    The scales of a network's features differ by orders of magnitude, which slows down
    gradient descent. The mean and scale are constant: the layer is a fitted
    ``StandardScaler`` inside of the network.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def fit(self, features: NDArray[np.float32], least_scale: float = 0.0) -> None:
        """Set the mean and scale of features (n, d)."""
        mean, scale = mean_and_scale(features, np.ones(len(features)), least_scale)
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardized features (n, d)."""
        return (features - self.mean) / self.scale


def mean_and_scale(
    features: NDArray[np.float32], weights: NDArray[Any], least_scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and scale of weighted features (n, d).

    As by ``StandardScaler``, constant features are not scaled; other scales are at
    least `least_scale` times their median. In float64, but by rows, since the features
    may exceed memory.
    """
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    rows = [*zip(shares, features, strict=True)]
    mean = np.asarray(sum(share * row.astype(np.float64) for share, row in rows))
    variance = sum(share * (row - mean) ** 2 for share, row in rows)
    deviation = np.sqrt(variance)
    scale = np.where(deviation < 1e-6, 1.0, deviation)
    return mean, np.maximum(scale, least_scale * np.median(scale))


class SplitNetwork(nn.Module):
    """A network in three pieces: frozen blocks, trainable blocks and a head.

    The frozen blocks, the first ones, are shared between estimators and are not run
    here: their outputs are the inputs of the trainable blocks. These are copies, in
    groups between main layers.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        groups: Sequence[Sequence[str]],
        n_frozen: int,
        head: nn.Sequential,
    ) -> None:
        super().__init__()
        frozen = list(blocks)[:n_frozen]
        self.frozen = {name: blocks[name] for name in frozen}  # not as submodules
        self._trainable_names = [name for name in blocks if name not in frozen]
        self.trainable = nn.Sequential()
        for group in groups:
            copies = [
                copy.deepcopy(blocks[name]) for name in group if name not in frozen
            ]
            if copies:
                self.trainable.append(nn.Sequential(*copies))
        self.head = head
        self._keeps_statistics = self._only_batch_norms = False
        freeze([self.trainable])

    @property
    def has_linear_head(self) -> bool:
        """Whether the head has a single layer with weights."""
        kinds = (nn.Linear, nn.Conv2d)
        return sum(isinstance(layer, kinds) for layer in self.head.modules()) == 1

    def unfreeze(self, only_batch_norms: bool, keeps_statistics: bool) -> None:
        """Unfreeze the trainable blocks, or only their batch-norms' parameters."""
        self._only_batch_norms = only_batch_norms
        self._keeps_statistics = keeps_statistics
        for module in self.trainable.modules():
            if not only_batch_norms or isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> SplitNetwork:
        """Set the mode, except of layers that stay in eval mode.

        These are batch-norms that keep their statistics, and everything that is not a
        batch-norm (dropout) if only batch-norms are trained.
        """
        super().train(mode)
        for module in self.trainable.modules():
            is_batch_norm = isinstance(module, _BatchNorm)
            stays = self._keeps_statistics if is_batch_norm else self._only_batch_norms
            if stays and not list(module.children()):
                module.eval()
        return self

    def forward(self, batch: Tensor) -> Tensor:
        """Return the outputs (n, n_outputs) for outputs of the frozen blocks."""
        outputs: Tensor = self.head(self.trainable(batch))
        return outputs

    def finished(self) -> tuple[FrozenPrefix, nn.Module]:
        """Return frozen copies on the CPU: all blocks, and the head in float64."""
        trained, head = copy.deepcopy((self.trainable, self.head))
        freeze([trained.cpu(), head])
        groups = trained.children()
        blocks: Any = [block for group in groups for block in group.children()]
        named = dict(zip(self._trainable_names, blocks, strict=True))
        return FrozenPrefix({**self.frozen, **named}), head.cpu().double()


def group_blocks(
    backbone: Backbone,
    blocks: Mapping[str, Block],
    layer: ResolvedLayer,
    image_size: ImageSize,
) -> list[tuple[str, ...]]:
    """Group the names of the blocks up to `layer` by the main layers they end in.

    A group without parameters, such as a pooling, belongs to the one before it.
    """
    ends = {*skeleton(backbone, image_size).layers.values(), layer.block}
    groups: list[tuple[str, ...]] = []
    group: list[str] = []
    for name in blocks:
        group.append(name)
        if name in ends:
            has_parameters = any(list(blocks[one].parameters()) for one in group)
            before = () if has_parameters or not groups else groups.pop()
            groups.append((*before, *group))
            group = []
    return groups


def count_frozen(
    backbone: Backbone,
    blocks: Mapping[str, Block],
    layer: ResolvedLayer,
    image_size: ImageSize,
    unfreeze: str | int | None,
) -> int:
    """Return how many of the blocks up to `layer`, from the first one, stay frozen."""
    names, groups = list(blocks), group_blocks(backbone, blocks, layer, image_size)
    if unfreeze is None:
        return len(names)
    if unfreeze == "batch_norm" and not has_batch_norms(blocks.values()):
        raise ValueError(
            f"unfreeze='batch_norm': {backbone.name!r} has no batch-norm up to layer "
            f"{layer.name!r}. Unfreeze its last blocks (unfreeze=1) or all (unfreeze="
            "'all')."
        )
    if unfreeze in ("batch_norm", "all"):
        return 0
    if not isinstance(unfreeze, str):  # numpy's integers are no `int`
        if unfreeze > len(groups):
            raise ValueError(
                f"unfreeze={unfreeze}, but {backbone.name!r} has {len(groups)} groups "
                f"of blocks up to layer {layer.name!r}. unfreeze='all' unfreezes all."
            )
        return names.index(groups[-int(unfreeze)][0])
    block = resolve_layer(backbone, unfreeze, image_size).block
    if block not in names:
        raise UnknownLayerError(
            f"unfreeze={unfreeze!r} comes after layer {layer.name!r}, where the "
            "network is truncated."
        )
    ends = skeleton(backbone, image_size).layers.values()
    first = {one: group[0] for group in groups for one in group if one in ends}
    return names.index(first.get(block, block))  # a main layer is its group


def check_trainable(backbone: Backbone, image_size: ImageSize) -> None:
    """Refuse to train blocks that would not compute in train mode what they should."""
    if not skeleton(backbone, image_size).is_trainable:
        raise ValueError(
            f"{backbone.name!r} can only be used frozen (unfreeze=None): its forward "
            "pass in train mode cannot be traced, or its gradients are others than "
            "those of the traced calls."
        )


def has_batch_norms(blocks: Iterable[nn.Module]) -> bool:
    """Return whether any of the blocks contains a batch-norm."""
    return any(
        isinstance(module, _BatchNorm) for block in blocks for module in block.modules()
    )


def build_head(
    estimator: Any, layout: Layout, n_outputs: int, seed: int
) -> nn.Sequential:
    """Build convolutions, pooling, standardization and fully connected layers.

    `layout` is that of the outputs of the backbone. Dropout comes after each hidden
    layer or, if there are none, before the only linear layer.
    """
    conv_channels = tuple(estimator.conv_channels)
    hidden_units, dropout = tuple(estimator.hidden_units), estimator.dropout
    if conv_channels and layout.grid is None:
        raise ValueError(
            f"conv_channels={conv_channels!r} require a feature map, but the layer "
            f"returns a vector of {layout.shape[0]} features."
        )
    if conv_channels and estimator.pooling in TOKEN_POOLINGS:
        raise ValueError(
            f"pooling={estimator.pooling!r} uses the class token, and conv_channels="
            f"{conv_channels!r} are convolutions of a feature map, which has none."
        )
    specs: list[tuple[Any, ...]] = []
    if conv_channels and layout.map_shape != layout.shape:
        specs += [("map", asdict(layout))]
    for n_out in conv_channels:
        specs += [("conv", layout.n_channels, n_out), ("relu",)]
        layout = Layout((n_out, *layout.map_shape[1:]), layout.grid)
    n_features = n_pooled(layout, estimator.pooling)
    specs += [("pool", estimator.pooling, asdict(layout))]
    specs += [("standardize", n_features)]
    for n_out in hidden_units:
        specs += [("linear", n_features, n_out), ("relu",)]
        specs += [("dropout", dropout)] if dropout else []
        n_features = n_out
    specs += [("dropout", dropout)] if dropout and not hidden_units else []
    specs += [("linear", n_features, n_outputs)]
    with own_random_state(as_int(derived_seed(seed, "head"))), torch_defaults():
        return _build_layers(specs)


def check_widths(name: str, widths: Sequence[Any]) -> None:
    """Raise if a layer of the head would not have a positive integer of units."""
    for width in widths:
        is_integer = isinstance(width, Integral) and not isinstance(width, bool)
        if not is_integer or width < 1:
            raise ValueError(f"{name} must be positive integers, got {width!r}.")


def _build_layers(specs: Sequence[Sequence[Any]]) -> nn.Sequential:
    """Build layers from their specifications: kind and arguments."""
    kinds: dict[str, Callable[..., nn.Module]] = {
        "conv": lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1),
        "relu": nn.ReLU,
        "pool": lambda pooling, layout: Pool(pooling, _layout(layout)),
        "map": lambda layout: AsMap(_layout(layout)),
        "standardize": Standardize,
        "linear": nn.Linear,
        "dropout": nn.Dropout,
    }
    return nn.Sequential(*(kinds[kind](*arguments) for kind, *arguments in specs))


def _layout(fields: dict[str, Any]) -> Layout:
    """Return a layout from its fields, which may have been saved as lists."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value
        for name, value in fields.items()
    }
    return Layout(**values)


def head_specs(head: nn.Sequential) -> list[list[Any]]:
    """Return the specifications from which a head with the same layers is built."""

    def spec(layer: nn.Module) -> list[Any]:
        match layer:
            case nn.Conv2d():
                return ["conv", layer.in_channels, layer.out_channels]
            case nn.Linear():
                return ["linear", layer.in_features, layer.out_features]
            case Standardize():
                return ["standardize", len(layer.mean)]
            case Pool():
                return ["pool", layer.pooling, asdict(layer.layout)]
            case AsMap():
                return ["map", asdict(layer.layout)]
            case nn.Dropout():
                return ["dropout", layer.p]
            case nn.ReLU():
                return ["relu"]
            case _:
                raise TypeError(
                    f"A head with a {type(layer).__name__} cannot be saved."
                )

    return [spec(layer) for layer in head]


def head_state(head: nn.Sequential) -> dict[str, Any]:
    """Return a head as plain data: specifications of layers, and numpy arrays."""
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    return {"layers": head_specs(head), "weights": weights}


def head_from_state(state: dict[str, Any]) -> nn.Sequential:
    """Build the frozen head that `head_state` described."""
    with torch.device("meta"):
        head = _build_layers(state["layers"])
    weights = {name: as_tensor(value) for name, value in state["weights"].items()}
    head.load_state_dict(weights, assign=True)
    return head.eval().requires_grad_(False)


@torch.no_grad()
def set_linear(layer: nn.Linear, coef: NDArray[Any], intercept: NDArray[Any]) -> None:
    """Copy scikit-learn's coefficients into a linear layer.

    For two classes they are one row, the logit of the second against the first.
    """
    if len(coef) == 1 and layer.out_features == 2:
        coef = np.vstack([-coef, coef]) / 2
        intercept = np.hstack([-intercept, intercept]) / 2
    layer.weight.copy_(torch.from_numpy(coef))
    layer.bias.copy_(torch.from_numpy(intercept))
