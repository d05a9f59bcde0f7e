"""The network of a fine-tuned classifier: pretrained blocks and a new head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl._random import as_int, derived_seed, own_random_state, torch_defaults
from skltl.exceptions import UnknownLayerError
from skltl.images import Preprocessing
from skltl.inference import as_tensor, can_pool, load_prefix, n_pooled, pool
from skltl.networks import (
    Backbone,
    CutPoint,
    block_shapes,
    resolve_layer,
    resolve_network,
    skeleton,
)


class Pool(nn.Module):
    """Pool a feature map (n, c, h, w) to features (n, d); vectors stay as they are.

    Parameters
    ----------
    pooling : str or int
        See `pool`.
    """

    def __init__(self, pooling: str | int) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the features (n, d)."""
        if feature_map.ndim == 2:
            return feature_map
        return pool(feature_map, self.pooling).to(feature_map.dtype)


class Standardise(nn.Module):
    """Bring each feature to mean 0 and deviation 1 on the training images.

    Features of one network differ in scale by orders of magnitude, which makes gradient
    descent slow. As a layer of fixed numbers it is the scaling of a pipeline of scaler
    and linear model, folded into the network.

    Parameters
    ----------
    n_features : int
        How many there are.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def set_from(self, features: NDArray[np.float32]) -> None:
        """Take mean and deviation of features (n, d); constant ones are not scaled.

        Computed in float64, by rows, as scikit-learn's ``StandardScaler`` does: there
        may be more of them than memory holds.
        """
        mean = features.mean(axis=0, dtype=np.float64)
        squares = sum((row - mean) ** 2 for row in features)
        deviation = np.sqrt(squares / len(features))
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(np.where(deviation < 1e-6, 1.0, deviation)))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features (n, d), standardised."""
        return (features - self.mean) / self.scale


def build_head(
    shape: tuple[int, ...],
    pooling: str | int,
    conv_channels: Sequence[int],
    hidden_units: Sequence[int],
    dropout: float,
    n_classes: int,
    seed: int,
) -> nn.Sequential:
    """Build the new layers.

    Parameters
    ----------
    shape : tuple of int
        Of what the cut gives for one image: (c, h, w) or (d,).
    pooling : str or int
        Between the convolutions and the fully connected layers.
    conv_channels, hidden_units : sequence of int
        Widths of convolutions (3 x 3) and of fully connected layers.
    dropout : float
        Before the last layer, and behind each hidden one.
    n_classes : int
        Width of the last layer.
    seed : int
        Of the initial weights, drawn as torch does.

    Returns
    -------
    Sequential
        Convolutions, pooling, standardisation, fully connected layers.
    """
    plan: list[tuple[Any, ...]] = []
    n_channels = shape[0]
    for n_out in conv_channels:
        plan += [("conv", n_channels, n_out), ("relu",)]
        n_channels = n_out
    n_features = n_pooled((n_channels, *shape[1:]), pooling)
    plan += [("pool", pooling), ("standardise", n_features)]
    for n_out in hidden_units:
        plan += [("linear", n_features, n_out), ("relu",)]
        plan += [("dropout", dropout)] if dropout else []
        n_features = n_out
    plan += [("dropout", dropout)] if dropout and not hidden_units else []
    plan += [("linear", n_features, n_classes)]
    with own_random_state(as_int(derived_seed(seed, "head"))), torch_defaults():
        return _layers(plan)


def head_state(head: nn.Sequential) -> dict[str, Any]:
    """Return the layers as plain data: what they are, and their numbers."""
    return {
        "layers": [list(_description(layer)) for layer in head],
        "numbers": {key: value.numpy() for key, value in head.state_dict().items()},
    }


def head_from_state(state: dict[str, Any]) -> nn.Sequential:
    """Build again what `head_state` described."""
    with torch.device("meta"):
        head = _layers(state["layers"])
    numbers = {key: as_tensor(value) for key, value in state["numbers"].items()}
    head.load_state_dict(numbers, assign=True)
    return head.eval().requires_grad_(False)


@torch.no_grad()
def set_linear(layer: nn.Linear, coef: NDArray[Any], intercept: NDArray[Any]) -> None:
    """Put scikit-learn's coefficients into a layer.

    Of two classes scikit-learn has one row, the logit of the second against the first.
    """
    if len(coef) == 1:
        coef = np.vstack([-coef, coef]) / 2
        intercept = np.hstack([-intercept, intercept]) / 2
    layer.weight.copy_(torch.from_numpy(coef))
    layer.bias.copy_(torch.from_numpy(intercept))


def _layers(plan: Sequence[Sequence[Any]]) -> nn.Sequential:
    kinds: dict[str, Callable[..., nn.Module]] = {
        "conv": lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1),
        "relu": nn.ReLU,
        "pool": Pool,
        "standardise": Standardise,
        "linear": nn.Linear,
        "dropout": nn.Dropout,
    }
    return nn.Sequential(*(kinds[kind](*numbers) for kind, *numbers in plan))


def _description(layer: nn.Module) -> tuple[Any, ...]:
    match layer:
        case nn.Conv2d():
            return "conv", layer.in_channels, layer.out_channels
        case nn.Linear():
            return "linear", layer.in_features, layer.out_features
        case Standardise():
            return "standardise", len(layer.mean)
        case Pool():
            return "pool", layer.pooling
        case nn.Dropout():
            return "dropout", layer.p
        case nn.ReLU():
            return ("relu",)
        case _:
            raise TypeError(f"A head with a {type(layer).__name__} cannot be saved.")


@dataclass(frozen=True)
class Foundation:
    """A network up to its cut, and what images go through before it.

    Parameters
    ----------
    backbone : Backbone
        The record of the network.
    preprocessing : Preprocessing
        Of the images.
    cut_point : CutPoint
        Where the new layers begin.
    blocks : mapping of str to Module
        Up to there: frozen, and shared with others.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    cut_point: CutPoint
    blocks: Mapping[str, nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's feature map (c, h, w), or vector (d,)."""
        block = self.cut_point.block
        return block_shapes(self.backbone, self.preprocessing.crop_size, (block,))[
            block
        ]

    def parts(self) -> list[tuple[str, ...]]:
        """Return the names of the blocks between neighbouring main cut points."""
        ends = {*skeleton(self.backbone).cut_points.values(), self.cut_point.block}
        parts, part = [], []
        for name in self.blocks:
            part.append(name)
            if name in ends:
                parts.append(tuple(part))
                part = []
        return parts


def lay_foundation(
    backbone: str | Backbone,
    weights: str | PathLike[str] | None,
    layer: str | int,
    image_size: int | None,
    pooling: str | int,
    seed: int,
    is_shared: bool,
) -> Foundation:
    """Load the network that the parameters of an estimator name.

    Random weights are kept for the next time if `is_shared`.

    Raises
    ------
    UnknownBackboneError, UnknownLayerError, WeightsError
        If they name something that is not there.
    ValueError
        If images of this size cannot cross the network, or be pooled in this way.
    """
    record, pretrained, preprocessing = resolve_network(backbone, weights, image_size)
    cut_point = resolve_layer(record, layer)
    prefix = load_prefix(record, pretrained, seed, [cut_point.block], is_shared)
    foundation = Foundation(record, preprocessing, cut_point, prefix.blocks)
    if not can_pool(foundation.shape, pooling):
        raise ValueError(
            f"pooling={pooling} does not suit what layer {cut_point.name!r} gives for "
            f"an image, of shape {foundation.shape}."
        )
    return foundation


def count_frozen(foundation: Foundation, unfreeze: str | int | None) -> int:
    """Return how many of the blocks, from the image on, never learn.

    Raises
    ------
    UnknownLayerError
        If `unfreeze` names no layer up to the cut.
    ValueError
        If there are not so many parts, or no batch-norms.
    """
    names = list(foundation.blocks)
    parts = foundation.parts()
    if unfreeze is None:
        return len(names)
    if unfreeze == "batch_norm":
        _check_batch_norms(foundation)
        return 0
    if unfreeze == "all":
        return 0
    if not isinstance(unfreeze, str):  # numpy's integers are no `int`
        if unfreeze > len(parts):
            raise ValueError(
                f"unfreeze={unfreeze}, but up to the layer "
                f"{foundation.cut_point.name!r} {foundation.backbone.name!r} has "
                f"{len(parts)} parts between main layers. unfreeze='all' is all."
            )
        return names.index(parts[-int(unfreeze)][0])
    block = resolve_layer(foundation.backbone, unfreeze).block
    for part in parts:
        if block == part[-1]:
            return names.index(part[0])
    if block in names:
        return names.index(block)
    raise UnknownLayerError(
        f"unfreeze={unfreeze!r} lies behind the cut at {foundation.cut_point.name!r}."
    )


def has_batch_norms(blocks: Iterable[nn.Module]) -> bool:
    """Tell whether there is a batch-norm in any of the blocks."""
    return any(
        isinstance(part, _BatchNorm) for block in blocks for part in block.modules()
    )


def _check_batch_norms(foundation: Foundation) -> None:
    if not has_batch_norms(foundation.blocks.values()):
        raise ValueError(
            f"unfreeze='batch_norm': {foundation.backbone.name!r} has no batch-norm "
            f"up to the layer {foundation.cut_point.name!r}. Unfreeze its last parts "
            "(unfreeze=1) or 'all' of it."
        )


def split_blocks(
    foundation: Foundation, n_frozen: int
) -> tuple[dict[str, nn.Module], list[dict[str, nn.Module]]]:
    """Return the frozen blocks, and copies of those that learn, by parts."""
    blocks = foundation.blocks
    frozen = dict(list(blocks.items())[:n_frozen])
    tuned = [
        {name: copy.deepcopy(blocks[name]) for name in part if name not in frozen}
        for part in foundation.parts()
    ]
    return frozen, [part for part in tuned if part]
