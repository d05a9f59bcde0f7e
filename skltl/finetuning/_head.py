"""The head: its layers, their inputs and initial weights, and heads as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skltl._parameters import resolve_device
from skltl._random import as_int, derived_seed, own_random_state, torch_defaults
from skltl.finetuning._data import Examples, Positions, batches
from skltl.finetuning._distributed import rank, run_together
from skltl.finetuning._inputs import Inputs, stored_inputs
from skltl.finetuning._network import SplitNetwork, autocast
from skltl.finetuning._objective import Linear, Objective
from skltl.inference import TOKEN_POOLINGS, as_tensor, n_pooled, pool
from skltl.networks import Layout


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


def pooled_inputs(
    estimator: Any, network: SplitNetwork, inputs: Inputs, n_images: int
) -> Inputs:
    """Return the inputs of the head while the backbone is frozen.

    Computed once, unless the number of augmented views is unlimited. Without
    convolutions in the head they are pooled features, which are small.
    """
    pooling = network.head[0] if isinstance(network.head[0], Pool) else nn.Identity()
    device = resolve_device(estimator.device)

    @torch.no_grad()
    def run(positions: Positions, views: NDArray[np.int64]) -> Tensor:
        batch = inputs.batch(positions, views)
        with autocast(device, estimator.precision_):
            feature_map = network.trainable(batch)
        features: Tensor = pooling(feature_map).float()
        return features

    if inputs.n_views is None:
        return Inputs(None, run)
    n_views, batch_size = 1 + inputs.n_views, estimator.batch_size
    positions, views = np.divmod(np.arange(n_images * n_views), n_views)
    starts = range(0, len(positions), batch_size)
    outputs = run_together(
        lambda batch: run(positions[batch], views[batch]),
        [slice(start, start + batch_size) for start in starts],
        len(positions),
    )
    stored = outputs.reshape(n_images, n_views, *outputs.shape[1:])
    return stored_inputs(stored, device)


def initialize_head(
    estimator: Any,
    head: nn.Sequential,
    inputs: Inputs,
    examples: Examples,
    objective: Objective,
    seed: int,
) -> None:
    """Fit the head's standardization and, if it is linear, a probe as its weights.

    Both are fitted to the training images without augmentation.
    """
    layers = list(head)
    scaler = next(layer for layer in layers if isinstance(layer, Standardize))
    # A pooling that comes first is part of the features.
    before = [] if isinstance(head[0], Pool) else layers[: layers.index(scaler)]
    run, positions = nn.Sequential(*before), examples.training
    unaugmented = np.zeros_like(positions)
    features = run_together(
        lambda batch: run(inputs.batch(positions[batch], unaugmented[batch])),
        batches(len(positions), estimator.batch_size),
        len(positions),
    )
    if rank() > 0:
        return  # process 0 sends the weights
    scaler.fit(features, objective.least_scale)
    linear, *hidden = [layer for layer in layers if isinstance(layer, nn.Linear)]
    is_linear = not hidden and not before
    if estimator.head_init == "probe" and is_linear:
        targets, weights = examples.targets[positions], examples.weights[positions]
        probe = _probe(features, targets, weights, scaler, objective, seed)
        if probe is not None:
            set_linear(linear, *probe)


def _probe(
    features: NDArray[np.float32],
    targets: NDArray[Any],
    weights: NDArray[Any],
    scaler: Standardize,
    objective: Objective,
    seed: int,
) -> Linear | None:
    """Return the linear function of standardized features that a probe finds.

    The probe has a scaler of its own, which is weighted, so that weights count as
    repetitions. That of the network is not: images of small weights, too, must have
    features of a size for which gradient descent is stable.
    """
    found = mean_and_scale(features, weights, objective.least_scale)
    mean, scale = (values.astype(np.float32) for values in found)
    probe = objective.probe((features - mean) / scale, targets, weights, seed)
    if probe is None:
        return None
    coef, intercept = probe
    shift = (scaler.mean.cpu().numpy() - mean) / scale
    return coef * (scaler.scale.cpu().numpy() / scale), intercept + coef @ shift


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
