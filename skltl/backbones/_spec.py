"""What a backbone is: an ordered list of named blocks, and a head.

Seen this way, cutting is slicing the list, capturing several cut points is walking it
once, and freezing the first blocks is a slice again. No hooks, no graph rewriting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from uuid import uuid4

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl.backbones._blocks import (
    children_of,
    expand,
    last_step,
    state_of,
)
from skltl.images import Preprocessing


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
    """A file of trained weights, and what a picture must go through for them.

    Parameters
    ----------
    name : str
        Such as ``"IMAGENET1K_V1"``.
    source : str, Path or None
        A URL whose file name ends in the first digits of the file's SHA-256 (as those
        of torchvision do), or a file on this machine, or ``None`` if the network is
        built with these weights in it.
    preprocessing : Preprocessing
        What a picture went through when the weights were trained.
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
        What a picture goes through where there are no trained weights to say so.
    weights : tuple of PretrainedWeights
        The first of them is what ``weights="imagenet"`` means.
    rename_keys : callable, default=None
        Turns a state dict's key, as old files have it, into that of today.
    needless_keys : tuple of str, default=()
        Beginnings of keys that a state dict may have although nothing needs them.
    token : str, default=""
        Backbones with the same token are equal. Drawn at random if it is empty, it goes
        where the record goes: a copy in another process is equal, and only a copy.

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
    token: str = ""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("A backbone needs at least one record of weights.")
        if not self.token:
            object.__setattr__(self, "token", uuid4().hex)

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
            What a picture goes through before the first block.

        Returns
        -------
        Backbone
            It holds copies of the modules, on the CPU, in float32.

        Raises
        ------
        TypeError
            If `blocks` is no dictionary of modules, or `preprocessing` no record.
        ValueError
            If a name cannot serve as one, a block is empty, or a picture's features
            would depend on the others in its batch (batch-norm without statistics).
        """
        if not isinstance(preprocessing, Preprocessing):
            raise TypeError(
                f"preprocessing must be a Preprocessing, got {preprocessing!r}."
            )
        if not isinstance(blocks, Mapping) or not blocks:
            raise TypeError("blocks must be a dictionary of names and modules.")
        for block_name in blocks:
            if not block_name.isidentifier() or block_name in ("head", "last"):
                raise ValueError(
                    f"{block_name!r} cannot name a block: use letters, digits and '_', "
                    "and neither 'head' nor 'last'."
                )
            _check_own_block(block_name, blocks[block_name])
        own = {key: _copy_for_cpu(block) for key, block in blocks.items()}
        own_head = None if head is None else _copy_for_cpu(head)
        return cls(
            name,
            build=partial(_network_of_blocks, own, own_head),
            preprocessing=preprocessing,
            weights=(PretrainedWeights("own", None, preprocessing),),
        )

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


def _copy_for_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float()


def _check_own_block(name: str, block: nn.Module) -> None:
    if not isinstance(block, nn.Module):
        raise TypeError(f"The block {name!r} must be a torch module, got {block!r}.")
    if isinstance(block, nn.Sequential) and not children_of(block):
        raise ValueError(f"The block {name!r} is empty.")
    for part in block.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"The block {name!r} has a batch-norm without running statistics: the "
                "features of a picture would depend on the others in its batch."
            )


def _network_of_blocks(
    blocks: Mapping[str, nn.Module], head: nn.Module | None, n_classes: int | None
) -> Network:
    blocks, head = copy.deepcopy((blocks, head))
    steps = expand(blocks)
    ends = {name: last_step(steps, name) for name in blocks}
    head_steps = {} if head is None else expand({"head": head})
    return Network(steps, head_steps, cut_points=ends)
