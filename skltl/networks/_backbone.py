"""Backbones: how a network is built, its weights, and the preprocessing of images."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

from sklearn.utils import check_scalar
from torch import Tensor, nn

from skltl.exceptions import shorten
from skltl.images import Preprocessing
from skltl.networks._blocks import Block
from skltl.networks._checks import (
    check_blocks,
    check_layers,
    check_module,
    check_name,
    check_preprocessing,
)
from skltl.networks._network import ImageSize, Model, freeze, state_of


@dataclass(frozen=True, eq=False, repr=False)
class StoredWeights:
    """Weights in memory: the state dict of the blocks of a network."""

    __module__ = "skltl.networks"  # the path in saved files

    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hugging Face Hub: the first of `names` there is."""

    __module__ = "skltl.networks"  # the path in saved files

    repository: str
    names: tuple[str, ...]
    revision: str | None = None


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained weights, and the preprocessing they were trained with.

    `source` is a file; a URL whose file name ends in the first digits of the SHA-256,
    as torchvision's do; a file of the Hugging Face Hub; weights in memory; or ``None``
    if the network is built with these weights. `categories` are the class names in the
    order of the logits, and `license` is empty if it is unknown.
    """

    __module__ = "skltl.networks"  # the path in saved files

    name: str
    source: str | Path | HubFile | StoredWeights | None
    preprocessing: Preprocessing
    categories: tuple[str, ...] = field(default=(), repr=False)
    aliases: tuple[str, ...] = ()
    license: str = ""


# From a number of classes, or None for the usual one, and the size of the images.
Builder = Callable[[int | None, ImageSize], Model]

# From the state dict of a file, a module, and the size of the images.
Converter = Callable[[dict[str, Tensor], nn.Module, ImageSize], Any]


@dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A pretrained network that can be truncated, run and saved.

    Use :meth:`from_module` to make a backbone of a network of your own.

    Parameters
    ----------
    name : str
        Name, as given to the `backbone` parameter of the estimators.
    build : callable
        Function ``build(n_classes, image_size)`` that returns a new network, a
        ``Model``; ``None`` stands for the usual number of classes.
    preprocessing : Preprocessing
        Preprocessing of images where no pretrained weights define it.
    weights : tuple of PretrainedWeights
        Available weights. The first ones are the default, ``weights="pretrained"``.
    convert_state : callable, default=None
        Function ``convert_state(state, module, image_size)`` that translates a state
        dict from a file to one of the module.
    known_as : str, default=""
        Identifier shared by all descriptions of this very network; see `token`.

    Attributes
    ----------
    token : str
        Identifier; backbones are equal if their tokens are. It is `known_as`, or else
        random: then only copies are equal, in other processes too. A backbone made by
        ``dataclasses.replace`` gets a new token.

    See Also
    --------
    skltl.register_backbone : Make a backbone available under its name.

    Examples
    --------
    >>> from torch import nn
    >>> from skltl import Backbone, Preprocessing
    >>> network = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
    ... )
    >>> Backbone.from_module("mine", network, preprocessing=Preprocessing(32))
    Backbone('mine')
    """

    name: str
    build: Builder
    preprocessing: Preprocessing
    weights: tuple[PretrainedWeights, ...]
    convert_state: Converter | None = None
    known_as: InitVar[str] = ""
    token: str = field(init=False)

    def __post_init__(self, known_as: str) -> None:
        if not self.weights:
            raise ValueError("weights is empty: a backbone needs at least one entry.")
        for one in self.weights:
            if one.preprocessing.n_channels != self.n_channels:
                raise ValueError(
                    f"The preprocessing of the weights {one.name!r} has "
                    f"{one.preprocessing.n_channels} channels, that of the backbone "
                    f"{self.n_channels}."
                )
        object.__setattr__(self, "token", known_as or uuid4().hex)

    @classmethod
    def from_module(
        cls,
        name: str,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        head: str | None = None,
        layers: Mapping[str, str] | None = None,
        n_prefix_tokens: int = 0,
    ) -> Backbone:
        """Make a backbone of a network of your own, with its present weights.

        The network is traced, and cut where a single tensor connects what comes before
        and after: any ConvNet or transformer becomes a sequence of blocks. The result
        is compared with the network itself, bit for bit.

        Parameters
        ----------
        name : str
            Name of the backbone.
        module : Module
            Network from a normalized batch (n, c, h, w) to logits or features, one
            tensor.
        preprocessing : Preprocessing
            Preprocessing of images before the network.
        head : str, default=None
            Path of the module that returns the logits, such as ``"fc"``. ``None`` if
            the network returns features.
        layers : dict of str to str, default=None
            Names of the main layers and paths of the modules that they are the outputs
            of, from the image to the logits. ``None`` names the outer modules that
            return feature maps or tokens, and their children, by their paths. Other
            paths can be given as `layer`, too.
        n_prefix_tokens : int, default=0
            Number of tokens of a transformer before those of the image, such as the
            class token.

        Returns
        -------
        Backbone
            The backbone. It holds a copy of the network, on the CPU, in float32.

        Raises
        ------
        TypeError
            If a parameter has another type than documented.
        ValueError
            If there is no module `head` with weights that the network uses, or it
            cannot be truncated at one of the `layers`; if the network cannot be traced,
            for example because its forward pass depends on pixel values; or if the
            features of an image would depend on the rest of its batch (batch-norm
            without running statistics). Networks that cannot be traced can be given to
            `from_blocks`.

        Examples
        --------
        >>> from torchvision.models import resnet18
        >>> from skltl import Backbone, Preprocessing, list_layers
        >>> mine = Backbone.from_module(
        ...     "mine", resnet18(), preprocessing=Preprocessing(64), head="fc"
        ... )
        >>> [layer.name for layer in list_layers(mine)]
        ['conv1', 'bn1', 'relu', 'maxpool', 'layer1.0', 'layer1', 'layer2.0', ...]
        """
        # It needs this module.
        from skltl.networks._verification import check_own, has_equal_gradients

        check_name(name)
        check_preprocessing(preprocessing)
        module = check_module(module, head)
        check_layers(layers)
        check_scalar(n_prefix_tokens, "n_prefix_tokens", Integral, min_val=0)
        heads = () if head is None else (head,)
        model = Model(
            module,
            dict(layers or {}),
            head=heads,
            n_prefix_tokens=n_prefix_tokens,
            finds_layers=layers is None,
        )
        backbone = own_backbone(name, model, preprocessing)
        check_own(backbone, layers or ())
        if not has_equal_gradients(backbone):
            model = replace(model, is_trainable=False)
            backbone = own_backbone(name, model, preprocessing)
        return backbone

    @classmethod
    def from_blocks(
        cls,
        name: str,
        blocks: Mapping[str, nn.Module],
        head: nn.Module | None = None,
        *,
        preprocessing: Preprocessing,
    ) -> Backbone:
        """Make a backbone of modules of your own that run one after the other.

        For networks that `from_module` cannot trace: the modules are used as they are.

        Parameters
        ----------
        name : str
            Name of the backbone.
        blocks : ordered mapping of str to Module
            Modules that run one after the other on a normalized batch (n, c, h, w).
            Their outputs are the main layers, under these names; the children of
            ``nn.Sequential`` modules are available as layers, too.
        head : Module, default=None
            Module from the output of the last block to the logits.
        preprocessing : Preprocessing
            Preprocessing of images before the first block.

        Returns
        -------
        Backbone
            The backbone. It holds copies of the modules, on the CPU, in float32, with
            their present weights.

        Raises
        ------
        TypeError
            If `blocks` is not a mapping of modules, or `head` or `preprocessing` has
            another type than documented.
        ValueError
            If a name is not allowed, a block is empty, or the features of an image
            would depend on the rest of its batch (batch-norm without running
            statistics).

        Examples
        --------
        >>> from collections import OrderedDict
        >>> from torch import nn
        >>> from skltl import Backbone, Preprocessing
        >>> blocks = OrderedDict(
        ...     stem=nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()),
        ...     block1=nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
        ... )
        >>> Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))
        Backbone('mine')
        """
        check_name(name)
        check_preprocessing(preprocessing)
        check_blocks(blocks)
        if not (head is None or isinstance(head, nn.Module)):
            raise TypeError(
                f"head must be a torch module or None, got {type(head).__name__}."
            )
        modules = OrderedDict(blocks)
        if head is not None:
            modules["head"] = head
        model = Model(
            nn.Sequential(modules),
            {block: block for block in blocks},
            head=() if head is None else ("head",),
            is_sequence=True,
        )
        return own_backbone(name, model, preprocessing)

    @property
    def n_channels(self) -> int:
        """Number of channels of the images that the network takes."""
        return self.preprocessing.n_channels

    @property
    def base(self) -> Backbone:
        """The backbone with all of the network, if this one has its first blocks."""
        return self.build.base if isinstance(self.build, Truncated) else self

    @property
    def own_network(self) -> Model | None:
        """The network that the backbone owns, if any; it must not be modified."""
        return self.build.model if isinstance(self.build, Own) else None

    @property
    def own_state(self) -> Mapping[str, Tensor] | None:
        """The state dict of the weights that the backbone owns, if any."""
        source = self.weights[0].source
        if isinstance(source, StoredWeights):
            return source.state
        return None if self.own_network is None else self.own_network.state()

    def __deepcopy__(self, memo: object) -> Backbone:
        return self  # immutable: a clone of an estimator may share it

    def __reduce_ex__(self, protocol: Any) -> Any:
        from skltl.networks._adaptation import AdaptedBuilder
        from skltl.networks._registry import get_backbone, is_included

        if is_included(self):
            return get_backbone, (self.name,)
        adapted = self.build
        if isinstance(adapted, AdaptedBuilder):  # without the paths of this machine
            return adapted.rebuild, (adapted.base, adapted.adaptation, self.name)
        return super().__reduce_ex__(protocol)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Backbone):
            return NotImplemented
        return self.token == other.token

    def __hash__(self) -> int:
        return hash(self.token)

    def __repr__(self) -> str:
        return f"Backbone({self.name!r})"


# The path in saved files. Not in the class, where dataclasses would look up `InitVar`.
Backbone.__module__ = "skltl"


@dataclass(frozen=True)
class Own:
    """Builder of copies of a network that a backbone owns, weights included."""

    __module__ = "skltl.networks"  # the path in saved files

    model: Model

    def __call__(self, n_classes: int | None, image_size: ImageSize) -> Model:
        """Return a copy, whose number of classes is fixed."""
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class Truncated:
    """Builder of the first blocks of the network of another backbone."""

    __module__ = "skltl.networks"  # the path in saved files

    base: Backbone
    last_block: str

    def __call__(self, n_classes: int | None, image_size: ImageSize) -> Model:
        """Build a network."""
        model = self.base.build(n_classes, image_size)
        return replace(model, last_block=self.last_block)


def truncated_backbone(
    backbone: Backbone,
    blocks: Mapping[str, Block],
    preprocessing: Preprocessing,
) -> Backbone:
    """Return a backbone with the first blocks of another one, and their weights."""
    stored = StoredWeights(state_of(blocks.values()))
    return Backbone(
        backbone.name,
        Truncated(backbone.base, list(blocks)[-1]),
        preprocessing,
        weights=(PretrainedWeights("own", stored, preprocessing),),
    )


def own_backbone(
    name: str,
    model: Model,
    preprocessing: Preprocessing,
    convert_state: Converter | None = None,
) -> Backbone:
    """Return a backbone with a copy of a network, with its present weights only.

    The copy is frozen, on the CPU, in float32.
    """
    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:  # of torch, such as for weights that are functions
        raise ValueError(
            f"{name!r} cannot be copied: {shorten(str(error), 200)} Remove weight_norm "
            "and spectral_norm from the trained network, or use those of "
            "torch.nn.utils.parametrizations."
        ) from error
    freeze([model.module.cpu().float()])
    own = PretrainedWeights("own", None, preprocessing)
    return Backbone(name, Own(model), preprocessing, (own,), convert_state)
