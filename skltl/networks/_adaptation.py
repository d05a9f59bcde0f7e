"""Adaptation of a network to images of another number of channels.

Only the trained filters of the first convolution change; all other weights are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_scalar
from torch import Tensor, nn

from skltl.exceptions import shorten
from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    Converter,
    PretrainedWeights,
    StoredWeights,
    own_backbone,
)
from skltl.networks._building import skeleton_model, trace_of, usual_size
from skltl.networks._checks import check_name
from skltl.networks._network import ImageSize, Model
from skltl.networks._recording import BATCH, outputs_in
from skltl.networks._registry import get_backbone

FILTERS = ("repeat", "average")


def adapt_channels(
    backbone: str | Backbone,
    n_channels: int,
    *,
    filters: str = "repeat",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> Backbone:
    """Adapt a pretrained network to images of another number of channels.

    The trained filters of its first convolution become filters of `n_channels`; all
    other weights are kept. Images must then have that many channels: arrays of shape
    (h, w, `n_channels`), or files with as many bands.

    Parameters
    ----------
    backbone : str or Backbone
        The network, as the `backbone` parameter of `CNNFeatureTransformer`.
    n_channels : int
        Number of channels of the images. Images of any kind are converted to gray for a
        single channel.
    filters : {"repeat", "average"}, default="repeat"
        With ``"repeat"``, the channels take the trained filters of red, green, blue,
        red, and so on: right where the first three of them are colors. With
        ``"average"``, all channels take the average of the trained filters. So does a
        single channel, in either case. Filters are scaled by 3 / `n_channels`, so that
        their responses keep their size.
    mean, std : sequence of `n_channels` floats, default=None
        Mean and standard deviation of each channel in units of [0, 1], for its
        normalization. ``None`` takes those of the trained channels as `filters` does.
    name : str, default=None
        Name of the new backbone; ``None`` is ``"resnet50-4ch"``, for instance.

    Returns
    -------
    Backbone
        The backbone, with the weights of `backbone`. In weights files the first
        convolution may have the trained number of channels, or `n_channels`.

    Raises
    ------
    UnknownBackboneError
        If there is no backbone of that name.
    TypeError, ValueError
        If a parameter has another type or value than documented, or the network does
        not begin with a convolution.

    See Also
    --------
    Backbone.from_module : A network of your own, for any number of channels.

    Notes
    -----
    This is how timm adapts its networks (``in_chans``). The features of an adapted
    network are a start: it knows nothing of what the new channels show until it is
    fine-tuned with all layers. Where a network standardizes the weights of its
    convolutions, as NFNets do, the scale of the filters has no effect.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, adapt_channels
    >>> multispectral = adapt_channels("tiny", 4)
    >>> X = np.random.default_rng(0).random((2, 80, 80, 4))
    >>> CNNFeatureTransformer(multispectral).fit_transform(X).shape
    (2, 288)
    """
    backbone = get_backbone(backbone)
    if isinstance(backbone.build, AdaptedBuilder):  # not of filters that were adapted
        backbone = backbone.build.base
    check_scalar(n_channels, "n_channels", Integral, min_val=1)
    if not isinstance(filters, str) or filters not in FILTERS:
        raise ValueError(
            f"Unknown filters {shorten(repr(filters))}. Known: {', '.join(FILTERS)}."
        )
    adaptation = Adaptation(
        *(_first_convolution(backbone), backbone.n_channels, int(n_channels), filters),
        *(
            None if one is None else tuple(np.atleast_1d(one).tolist())
            for one in (mean, std)
        ),
    )
    preprocessing = adaptation.preprocessing(backbone.preprocessing)
    if preprocessing.n_channels != n_channels:
        raise ValueError(
            f"mean and std have {preprocessing.n_channels} values, for {n_channels} "
            "channels."
        )
    name = name or f"{backbone.name.removeprefix('timm:')}-{int(n_channels)}ch"
    check_name(name)
    own = backbone.own_network
    if own is None:
        return _adapted_backbone(backbone, name, adaptation)
    model = replace(own, module=copy.deepcopy(own.module))
    adaptation.adapt(model.module)
    convert = AdaptedConverter(None, adaptation)
    return own_backbone(name, model, preprocessing, convert)


def _adapted_backbone(
    backbone: Backbone, name: str, adaptation: Adaptation
) -> Backbone:
    """Return a backbone that builds the network of another one, and adapts it."""
    weights = tuple(
        replace(
            one,
            source=_adapted_source(one, adaptation),
            preprocessing=adaptation.preprocessing(one.preprocessing),
        )
        for one in backbone.weights
    )
    builder = AdaptedBuilder(backbone, adaptation)
    convert = AdaptedConverter(backbone.convert_state, adaptation)
    preprocessing = adaptation.preprocessing(backbone.preprocessing)
    return Backbone(
        *(name, builder, preprocessing, weights, convert),
        known_as=f"{backbone.token} {adaptation}",
    )


@dataclass(frozen=True)
class Adaptation:
    """Filters of `n_channels` from trained ones of `n_trained` channels.

    `convolution` is the path of the network's first convolution. `mean` and `std`
    normalize the channels, if they are given.
    """

    __module__ = "skltl.networks"  # the path in saved files

    convolution: str
    n_trained: int
    n_channels: int
    filters: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @property
    def _is_average(self) -> bool:
        # A single channel of three would ignore the trained filters of two.
        return self.filters == "average" or self.n_channels == 1

    def preprocessing(self, trained: Preprocessing) -> Preprocessing:
        """Return the preprocessing of images for the adapted network."""
        return replace(
            trained,
            mean=self._per_channel(trained.mean) if self.mean is None else self.mean,
            std=self._per_channel(trained.std) if self.std is None else self.std,
        )

    def _per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
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

    @staticmethod
    def rebuild(base: Backbone, adaptation: Adaptation, name: str) -> Backbone:
        """Return the adapted backbone, from a file."""
        one = adaptation
        settings: dict[str, Any] = {"mean": one.mean, "std": one.std, "name": name}
        return adapt_channels(base, one.n_channels, filters=one.filters, **settings)


@dataclass(frozen=True)
class AdaptedConverter:
    """Converter of the state dict of a file, which is adapted unless it was before."""

    __module__ = "skltl.networks"  # the path in saved files

    base: Converter | None
    adaptation: Adaptation

    def __call__(
        self, state: dict[str, Tensor], module: nn.Module, image_size: ImageSize
    ) -> dict[str, Tensor]:
        """Translate a state dict to one of the adapted network."""
        if self.base is not None:
            state = self.base(state, module, image_size)
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
    users = [
        call.function if isinstance(call.function, str) else call.module
        for call in calls
        if BATCH in outputs_in((call.args, call.kwargs))
    ]
    path = users[0]
    module = dict(skeleton_model(backbone, size).module.named_modules())[path]
    is_plain = isinstance(module, nn.Conv2d) and "weight" in module._parameters
    n_uses = sum(call.function == path for call in calls)  # 0: it is looked into
    if len(users) > 1 or not is_plain or module.groups != 1 or n_uses > 1:
        kind = type(module).__name__
        raise ValueError(
            f"{backbone.name!r} does not begin with a single convolution with plain "
            f"weights, so its filters cannot be adapted: its first layer is {path!r}, "
            f"a {kind}."
        )
    return path
