"""Backbones: an ordered sequence of named blocks, and a head.

Truncating a network is slicing the sequence, extracting several layers is iterating
over it once, and freezing the first blocks is a slice again: no hooks, no graph
rewriting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain
from pathlib import Path
from uuid import uuid4

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl.images import Preprocessing


def is_module(value: object) -> bool:
    """Return whether a value is a torch module, compiled ones included."""
    return isinstance(value, nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of a module, with repetitions.

    ``named_children`` skips repetitions, such as the second use of a shared ReLU.
    """
    return [(key, child) for key, child in module._modules.items() if child is not None]


def expand(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Split every plain ``nn.Sequential`` without hooks into its children, recursively.

    The resulting blocks are named by their module paths.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in modules.items():
        is_plain = type(module).forward is nn.Sequential.forward
        if is_plain and not has_hooks(module):
            blocks |= expand(
                {f"{name}.{key}": child for key, child in children_of(module)}
            )
        else:
            blocks[name] = module
    return blocks


def truncate(
    blocks: Mapping[str, nn.Module], wanted: Sequence[str]
) -> dict[str, nn.Module]:
    """Return the blocks up to and including the last wanted one."""
    names = list(blocks)
    deepest = max(names.index(name) for name in wanted)
    return {name: blocks[name] for name in names[: deepest + 1]}


def last_block(blocks: Mapping[str, nn.Module], path: str) -> str:
    """Return the last block at or inside a module path; raise KeyError for none."""
    inside = [block for block in blocks if f"{block}.".startswith(f"{path}.")]
    if not inside:
        raise KeyError(path)
    return inside[-1]


def state_of(blocks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the state dict of a sequence of blocks."""
    return {
        f"{name}.{key}": value
        for name, block in blocks.items()
        for key, value in block.state_dict().items()
    }


def load_state(blocks: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Load a state dict with the keys of `state_of`, without copying its tensors."""
    for name, block in blocks.items():
        own = {key: state[f"{name}.{key}"] for key in block.state_dict()}
        block.load_state_dict(own, assign=True)


def freeze(modules: Mapping[str, nn.Module]) -> None:
    """Set modules to eval mode and turn their gradients off."""
    for module in modules.values():
        module.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Network:
    """The blocks of a network, in the order of the forward pass, and its head.

    `blocks` and `head` are named by module paths. `layers` maps the name of each
    main layer to the block that computes it, `aliases` further names to main layers.
    """

    blocks: Mapping[str, nn.Module]
    head: Mapping[str, nn.Module]
    layers: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def logits(self, batch: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of a normalized batch (n, 3, h, w)."""
        for module in chain(self.blocks.values(), self.head.values()):
            batch = module(batch)
        return batch

    def state(self) -> dict[str, Tensor]:
        """Return the state dict of the blocks and the head."""
        return state_of({**self.blocks, **self.head})


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained weights, and the preprocessing they were trained with.

    `source` is a file; a URL whose file name ends in the first digits of the SHA-256,
    as torchvision's do; or ``None`` if the network is built with these weights.
    `categories` are the class names in the order of the logits.
    """

    name: str
    source: str | Path | None
    preprocessing: Preprocessing
    categories: tuple[str, ...] = field(default=(), repr=False)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A pretrained network that can be truncated, run and saved.

    Use :meth:`from_blocks` to make a backbone of a network of your own.

    Parameters
    ----------
    name : str
        Name, as given to the `backbone` parameter of the estimators.
    build : callable
        Function ``build(n_classes)`` that returns a new network; ``None`` stands for
        the usual number of classes.
    preprocessing : Preprocessing
        Preprocessing of images where no pretrained weights define it.
    weights : tuple of PretrainedWeights
        Available weights. The first ones are the default, ``weights="imagenet"``.
    rename_keys : callable, default=None
        Function that translates the keys of old state dicts to the current ones.
    needless_keys : tuple of str, default=()
        Prefixes of the keys of a state dict that are ignored.
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

    name: str
    build: Callable[[int | None], Network]
    preprocessing: Preprocessing
    weights: tuple[PretrainedWeights, ...]
    rename_keys: Callable[[str], str] | None = None
    needless_keys: tuple[str, ...] = ()
    known_as: InitVar[str] = ""
    token: str = field(init=False)

    def __post_init__(self, known_as: str) -> None:
        if not self.weights:
            raise ValueError("weights is empty: a backbone needs at least one entry.")
        object.__setattr__(self, "token", known_as or uuid4().hex)

    @classmethod
    def from_blocks(
        cls,
        name: str,
        blocks: Mapping[str, nn.Module],
        head: nn.Module | None = None,
        *,
        preprocessing: Preprocessing,
    ) -> Backbone:
        """Make a backbone from a network of your own, with its present weights.

        Parameters
        ----------
        name : str
            Name of the backbone.
        blocks : ordered mapping of str to Module
            Modules that run one after the other on a normalized batch (n, 3, h, w).
            Their outputs are the main layers, under these names; the children of
            ``nn.Sequential`` modules are available as layers, too.
        head : Module, default=None
            Module from the output of the last block to the logits.
        preprocessing : Preprocessing
            Preprocessing of images before the first block.

        Returns
        -------
        Backbone
            The backbone. It holds copies of the modules, on the CPU, in float32.

        Raises
        ------
        TypeError
            If `blocks` is not a mapping of modules, or `head` or `preprocessing` has
            another type than documented.
        ValueError
            If a name is not allowed, a block is empty, or the features of an image
            would depend on the rest of its batch (batch-norm without running
            statistics).
        """
        if not isinstance(preprocessing, Preprocessing):
            raise TypeError(
                f"preprocessing must be a Preprocessing, got {preprocessing!r}."
            )
        _check_blocks(blocks)
        if not (head is None or isinstance(head, nn.Module)):
            raise TypeError(
                f"head must be a torch module or None, got {type(head).__name__}."
            )
        own, own_head = copy.deepcopy((dict(blocks), head))
        expanded = expand(own)
        ends = {block: last_block(expanded, block) for block in own}
        head_modules = {} if own_head is None else expand({"head": own_head})
        network = Network(expanded, head_modules, ends)
        return own_backbone(name, network, preprocessing)

    @property
    def own_network(self) -> Network | None:
        """The network that the backbone owns, if any; it must not be modified."""
        return self.build.network if isinstance(self.build, OwnNetwork) else None

    def __deepcopy__(self, memo: object) -> Backbone:
        return self  # immutable: a clone of an estimator may share it

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


def own_backbone(name: str, network: Network, preprocessing: Preprocessing) -> Backbone:
    """Return a backbone that owns a network, with its present weights only.

    The network is frozen and moved to the CPU and to float32, in place.
    """
    modules = {**network.blocks, **network.head}
    for module in modules.values():
        module.cpu().float()
    freeze(modules)
    own = PretrainedWeights("own", None, preprocessing)
    return Backbone(name, OwnNetwork(network), preprocessing, weights=(own,))


@dataclass(frozen=True)
class OwnNetwork:
    """Builder of copies of a network, for `own_backbone`."""

    network: Network

    def __call__(self, n_classes: int | None) -> Network:
        """Return a copy, whose number of classes is fixed."""
        return copy.deepcopy(self.network)


def _check_blocks(blocks: Mapping[str, nn.Module]) -> None:
    """Refuse what is not a mapping of names to modules that can be blocks."""
    if not isinstance(blocks, Mapping):
        raise TypeError(
            "blocks must be a dictionary of names and modules, got a "
            f"{type(blocks).__name__}. For an nn.Sequential, use "
            "{'block' + name: child for name, child in module.named_children()}."
        )
    if not blocks:
        raise ValueError("blocks is empty: a backbone needs at least one block.")
    for name, block in blocks.items():
        if not isinstance(name, str):
            raise TypeError(f"Block names must be strings, got {name!r}.")
        if not name.isidentifier() or name in ("head", "last"):
            raise ValueError(
                f"{name!r} cannot name a block: use letters, digits and '_', and "
                "neither 'head' nor 'last'."
            )
        _check_block(name, block)


def _check_block(name: str, block: nn.Module) -> None:
    """Refuse a value that is not a module, is empty, or depends on the whole batch."""
    if not isinstance(block, nn.Module):
        raise TypeError(
            f"The block {name!r} must be a torch module, got {type(block).__name__}."
        )
    if isinstance(block, nn.Sequential) and not children_of(block):
        raise ValueError(f"The block {name!r} is empty.")
    for module in block.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"The block {name!r} has a batch-norm without running statistics: the "
                "features of an image would depend on the others in its batch."
            )
