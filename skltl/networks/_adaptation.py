"""Adaptation of a network to images of another number of channels.

Only the trained filters of the first convolution change; all other weights are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from sklearn.utils import check_scalar
from torch import Tensor, nn

from skltl.exceptions import shorten
from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    PretrainedWeights,
    StoredWeights,
    own_backbone,
)
from skltl.networks._building import skeleton_model, trace_of, usual_size
from skltl.networks._network import ImageSize, Model
from skltl.networks._recording import BATCH, outputs_in

FILTERS = ("repeat", "average")


def adapted_backbone(
    backbone: Backbone,
    n_channels: int,
    filters: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Backbone:
    """Return a backbone for images of another number of channels."""
    _check_parameters(n_channels, filters, mean, std)
    adaptation = Adaptation(
        _first_convolution(backbone), backbone.n_channels, int(n_channels), filters
    )

    def adapted(one: Preprocessing) -> Preprocessing:
        return replace(
            one,
            mean=adaptation.per_channel(one.mean) if mean is None else mean,
            std=adaptation.per_channel(one.std) if std is None else std,
        )

    name = f"{backbone.name}-{n_channels}ch"
    preprocessing = adapted(backbone.preprocessing)
    own = backbone.own_network
    if own is not None:
        model = replace(own, module=copy.deepcopy(own.module))
        adaptation.adapt(model.module)
        return own_backbone(name, model, preprocessing)
    builder = AdaptedBuilder(backbone, adaptation)
    weights = [
        replace(
            one,
            source=_adapted_source(one, adaptation),
            preprocessing=adapted(one.preprocessing),
        )
        for one in backbone.weights
    ]
    token = f"{backbone.token} {adaptation}"
    return Backbone(
        *(name, builder, preprocessing, tuple(weights), builder.convert),
        known_as=token,
    )


def _check_parameters(
    n_channels: int,
    filters: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> None:
    check_scalar(n_channels, "n_channels", Integral, min_val=1)
    if filters not in FILTERS:
        raise ValueError(
            f"Unknown filters {shorten(repr(filters))}. Known: {', '.join(FILTERS)}."
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != n_channels:
            raise ValueError(
                f"{name} has {len(values)} values, for {n_channels} channels."
            )


@dataclass(frozen=True)
class Adaptation:
    """Filters of `n_channels` from trained ones of `n_trained` channels.

    `convolution` is the path of the network's first convolution.
    """

    __module__ = "skltl.networks"  # the path in saved files

    convolution: str
    n_trained: int
    n_channels: int
    filters: str

    @property
    def _is_average(self) -> bool:
        # A single channel of three would ignore the trained filters of two.
        return self.filters == "average" or self.n_channels == 1

    def per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Return a value of each new channel from those of the trained ones."""
        if self._is_average:
            return (sum(values) / len(values),) * self.n_channels
        return tuple(values[n % len(values)] for n in range(self.n_channels))

    def weight(self, trained: Tensor) -> Tensor:
        """Return filters (n_out, n_channels, h, w) whose responses keep their size."""
        if self._is_average:
            trained = trained.mean(dim=1, keepdim=True)
        numbers = torch.arange(self.n_channels, device=trained.device)
        adapted = trained[:, numbers % trained.shape[1]]
        return adapted * (self.n_trained / self.n_channels)

    def adapt(self, module: nn.Module) -> None:
        """Adapt the first convolution of a network in place."""
        convolution: Any = module.get_submodule(self.convolution)
        weight = self.weight(convolution.weight.detach())
        convolution.in_channels = self.n_channels
        convolution.weight = nn.Parameter(weight, convolution.weight.requires_grad)

    def adapted_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict for the adapted network; it may be for that already."""
        key = f"{self.convolution}.weight"
        weight = state.get(key)
        if weight is None or weight.ndim != 4 or weight.shape[1] != self.n_trained:
            return dict(state)
        return {**state, key: self.weight(weight)}


@dataclass(frozen=True)
class AdaptedBuilder:
    """Builder of the network of another backbone with adapted filters."""

    __module__ = "skltl.networks"  # the path in saved files

    base: Backbone
    adaptation: Adaptation

    def __call__(self, n_classes: int | None, image_size: ImageSize) -> Model:
        """Build a network."""
        model = self.base.build(n_classes, image_size)
        self.adaptation.adapt(model.module)
        return model

    def convert(
        self, state: dict[str, Tensor], module: nn.Module, image_size: ImageSize
    ) -> dict[str, Tensor]:
        """Translate the state dict of a file to one of the adapted network."""
        if self.base.convert_state is not None:
            state = self.base.convert_state(state, module, image_size)
        return self.adaptation.adapted_state(state)


def _adapted_source(weights: PretrainedWeights, adaptation: Adaptation) -> Any:
    """Return the source of weights, adapted if they are in memory."""
    if isinstance(weights.source, StoredWeights):
        return StoredWeights(adaptation.adapted_state(weights.source.state))
    return weights.source


def _first_convolution(backbone: Backbone) -> str:
    """Return the path of the convolution that alone uses the images."""
    size = usual_size(backbone)
    calls = [call for call in trace_of(backbone, size).calls if call is not None]
    users = {
        call.function if isinstance(call.function, str) else call.module
        for call in calls
        if BATCH in outputs_in((call.args, call.kwargs))
    }
    modules = dict(skeleton_model(backbone, size).module.named_modules())
    for path in users if len(users) == 1 else ():
        module = modules[path]
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return path
    raise ValueError(
        f"{backbone.name!r} does not begin with a convolution that alone uses the "
        "images, so its filters cannot be adapted to other channels."
    )
