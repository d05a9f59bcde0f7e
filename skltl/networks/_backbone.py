"""Backbones: an ordered list of named blocks, and a head.

Seen this way, truncating is slicing the list, capturing several layers is iterating
over it once, and freezing the first blocks is a slice again. No hooks, no graph
rewriting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl._parameters import settle_in_forked_child
from skltl.images import Preprocessing


def expand(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Take sequences of modules apart, down to the finest steps.

    A step's name is its path. What is no plain ``nn.Sequential``, or has hooks, stays
    whole.
    """
    steps: dict[str, nn.Module] = {}
    for name, module in modules.items():
        is_plain = type(module).forward is nn.Sequential.forward
        if is_plain and not has_hooks(module):
            steps |= expand(
                {f"{name}.{key}": child for key, child in children_of(module)}
            )
        else:
            steps[name] = module
    return steps


def cut(blocks: Mapping[str, nn.Module], wanted: Sequence[str]) -> dict[str, nn.Module]:
    """Return the blocks up to the last wanted one, nothing of what comes after."""
    names = list(blocks)
    deepest = max(names.index(name) for name in wanted)
    return {name: blocks[name] for name in names[: deepest + 1]}


def is_module(value: object) -> bool:
    """Tell whether something is a torch module, compiled ones included."""
    return isinstance(value, nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether more than ``forward`` happens when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module's children, each as often as it is used.

    ``named_children`` leaves out repetitions: the second use of one shared ReLU.
    """
    return [(key, child) for key, child in module._modules.items() if child is not None]


def state_of(blocks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the blocks' parameters and statistics, by block and torch's name."""
    return {
        f"{name}.{key}": value
        for name, block in blocks.items()
        for key, value in block.state_dict().items()
    }


def load_state(blocks: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Put parameters and statistics into blocks, in place of what they have.

    The keys must be those of `state_of`; the tensors are used as they are, not copied.
    """
    for name, block in blocks.items():
        part = {key: state[f"{name}.{key}"] for key in block.state_dict()}
        block.load_state_dict(part, assign=True)


def freeze(modules: Mapping[str, nn.Module]) -> None:
    """Make modules fixed functions of their input: no gradients, evaluation mode."""
    for module in modules.values():
        module.eval().requires_grad_(False)


def last_step(steps: Mapping[str, nn.Module], path: str) -> str:
    """Return the last step that is ``path`` or lies inside of it.

    Raises
    ------
    KeyError
        If there is none.
    """
    inside = [step for step in steps if step == path or step.startswith(f"{path}.")]
    if not inside:
        raise KeyError(path)
    return inside[-1]


@torch.inference_mode()
def output_shapes(
    blocks: Mapping[str, nn.Module], size: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of one image's feature map after each block.

    Parameters
    ----------
    blocks : mapping of str to Module
        In evaluation mode, with or without numbers in them (torch's "meta" device).
    size : int
        Height and width of the image.

    Returns
    -------
    dict of str to tuple of int
        (c, h, w), or (d,) after a fully connected layer.
    """
    settle_in_forked_child()  # the weights may be real ones
    parameters = chain.from_iterable(block.parameters() for block in blocks.values())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    feature_map = torch.zeros(1, 3, size, size, dtype=torch.float32, device=device)
    shapes = {}
    for name, block in blocks.items():
        feature_map = block(feature_map)  # (1, c, h, w)
        shapes[name] = tuple(feature_map.shape[1:])
    return shapes


@dataclass(frozen=True, eq=False)
class Network:
    """A network as its blocks in the order of the forward pass, and its head.

    Parameters
    ----------
    blocks : mapping of str to Module
        Everything before the head, in the finest steps that follow one another. The
        names are the modules' paths in the network they come from.
    head : mapping of str to Module
        From the features behind the last block to the logits, likewise.
    cut_points : mapping of str to str
        The main cut points: a short name, and the block after which it lies.
    aliases : mapping of str to str
        What people call main cut points elsewhere.
    """

    blocks: Mapping[str, nn.Module]
    head: Mapping[str, nn.Module]
    cut_points: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def logits(self, batch: Tensor) -> Tensor:
        """Run everything on a normalised batch (n, 3, h, w)."""
        for module in chain(self.blocks.values(), self.head.values()):
            batch = module(batch)
        return batch

    def state(self) -> dict[str, Tensor]:
        """Return all parameters and statistics by the names torch gives them."""
        return state_of({**self.blocks, **self.head})


@dataclass(frozen=True)
class PretrainedWeights:
    """A file of trained weights, and what an image must go through for them.

    Parameters
    ----------
    name : str
        Such as ``"IMAGENET1K_V1"``.
    source : str, Path or None
        A URL whose file name ends in the first digits of the file's SHA-256 (as those
        of torchvision do), or a file on this machine, or ``None`` if the network is
        built with these weights in it.
    preprocessing : Preprocessing
        What an image went through when the weights were trained.
    categories : tuple of str, default=()
        Names of the classes, in the order of the logits.
    aliases : tuple of str, default=()
        Other names.
    """

    name: str
    source: str | Path | None
    preprocessing: Preprocessing
    categories: tuple[str, ...] = field(default=(), repr=False)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A pretrained network that skltl can cut, run and save, under a name.

    Parameters
    ----------
    name : str
        What the `backbone` parameter of the estimators takes.
    build : callable
        ``build(n_classes)`` makes a new `Network`; ``None`` is the usual number
        of classes.
    preprocessing : Preprocessing
        What an image goes through where there are no trained weights to say so.
    weights : tuple of PretrainedWeights
        The first of them is what ``weights="imagenet"`` means.
    rename_keys : callable, default=None
        Turns a state dict's key, as old files have it, into that of today.
    needless_keys : tuple of str, default=()
        Beginnings of keys that a state dict may have although nothing needs them.
    known_as : str, default=""
        What is the same wherever this very network is described; see `token`.

    Attributes
    ----------
    token : str
        Backbones with the same token are equal. It is `known_as`, or else drawn at
        random: then a copy, also in another process, is equal, and nothing else is. A
        backbone that ``dataclasses.replace`` makes is another one.

    See Also
    --------
    skltl.register_backbone : Make a backbone known under its name.

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
            raise ValueError("A backbone needs at least one record of weights.")
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
        """Make a backbone from a network of your own, with the weights it has.

        Parameters
        ----------
        name : str
            Its name.
        blocks : ordered mapping of str to Module
            What to run, one after the other, on a normalised batch (n, 3, h, w). The
            places between them become the main cut points, by these names; inside of
            ``nn.Sequential`` blocks there are finer ones.
        head : Module, default=None
            From the last block's output to the logits.
        preprocessing : Preprocessing
            What an image goes through before the first block.

        Returns
        -------
        Backbone
            It holds copies of the modules, on the CPU, in float32.

        Raises
        ------
        TypeError
            If `blocks` is no dictionary of modules, or `preprocessing` no record.
        ValueError
            If a name cannot serve as one, a block is empty, or an image's features
            would depend on the others in its batch (batch-norm without statistics).
        """
        if not isinstance(preprocessing, Preprocessing):
            raise TypeError(
                f"preprocessing must be a Preprocessing, got {preprocessing!r}."
            )
        _check_own_blocks(blocks)
        if not (head is None or isinstance(head, nn.Module)):
            raise TypeError(
                f"head must be a torch module or None, got {type(head).__name__}."
            )
        own, own_head = copy.deepcopy((dict(blocks), head))
        steps = expand(own)
        ends = {block: last_step(steps, block) for block in own}
        head_steps = {} if own_head is None else expand({"head": own_head})
        return cls.from_network(name, Network(steps, head_steps, ends), preprocessing)

    @classmethod
    def from_network(
        cls, name: str, network: Network, preprocessing: Preprocessing
    ) -> Backbone:
        """Make a backbone that keeps a network, with the weights it has.

        Parameters
        ----------
        name : str
            Its name.
        network : Network
            It becomes the backbone's own: on the CPU, in float32, frozen.
        preprocessing : Preprocessing
            What an image goes through before the first block.

        Returns
        -------
        Backbone
            With these weights and no others.
        """
        modules = {**network.blocks, **network.head}
        for module in modules.values():
            module.cpu().float()
        freeze(modules)
        own = PretrainedWeights("own", None, preprocessing)
        return cls(name, OwnNetwork(network), preprocessing, weights=(own,))

    @property
    def own_network(self) -> Network | None:
        """The network with its weights, if the backbone keeps one. Never changed."""
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


@dataclass(frozen=True)
class OwnNetwork:
    """Builds copies of a network that it keeps; see `Backbone.from_network`.

    Parameters
    ----------
    network : Network
        Frozen, and never changed.
    """

    network: Network

    def __call__(self, n_classes: int | None) -> Network:
        """Return a copy; it is for the number of classes that it is for."""
        return copy.deepcopy(self.network)


def _check_own_blocks(blocks: Mapping[str, nn.Module]) -> None:
    if isinstance(blocks, nn.Module):
        raise TypeError(
            f"blocks must be a dictionary of names and modules, got a "
            f"{type(blocks).__name__}. Of an nn.Sequential: "
            "{'block' + name: child for name, child in module.named_children()}."
        )
    if not isinstance(blocks, Mapping):
        raise TypeError(
            "blocks must be a dictionary of names and modules, got "
            f"{type(blocks).__name__}."
        )
    if not blocks:
        raise ValueError("blocks is empty: a backbone has one block at least.")
    for name, block in blocks.items():
        if not isinstance(name, str):
            raise TypeError(f"The names of blocks must be texts, got {name!r}.")
        if not name.isidentifier() or name in ("head", "last"):
            raise ValueError(
                f"{name!r} cannot name a block: use letters, digits and '_', and "
                "neither 'head' nor 'last'."
            )
        _check_own_block(name, block)


def _check_own_block(name: str, block: nn.Module) -> None:
    if not isinstance(block, nn.Module):
        raise TypeError(
            f"The block {name!r} must be a torch module, got {type(block).__name__}."
        )
    if isinstance(block, nn.Sequential) and not children_of(block):
        raise ValueError(f"The block {name!r} is empty.")
    for part in block.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"The block {name!r} has a batch-norm without running statistics: the "
                "features of an image would depend on the others in its batch."
            )
