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

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True, eq=False)
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
            It holds copies of the modules.

        Raises
        ------
        ValueError
            If there are no blocks, or a name cannot serve as one.
        """
        if not blocks:
            raise ValueError("A backbone needs at least one block.")
        for block_name in blocks:
            if not block_name.isidentifier() or block_name in ("head", "last"):
                raise ValueError(
                    f"{block_name!r} cannot name a block: use letters, digits and '_', "
                    "and neither 'head' nor 'last'."
                )
        copies = copy.deepcopy((dict(blocks), head))
        own_weights = PretrainedWeights("own", None, preprocessing)
        build = partial(_network_of_blocks, *copies)
        return cls(name, build, preprocessing, (own_weights,))

    def __deepcopy__(self, memo: object) -> Backbone:
        return self  # immutable: a clone of an estimator may share it

    def __repr__(self) -> str:
        return f"Backbone({self.name!r})"


def expand(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Take sequences of modules apart, down to the finest steps.

    A step's name is its path; what is no plain ``nn.Sequential`` stays whole.
    """
    steps: dict[str, nn.Module] = {}
    for name, module in modules.items():
        is_sequence = isinstance(module, nn.Sequential)
        if is_sequence and type(module).forward is nn.Sequential.forward:
            children = {
                f"{name}.{key}": child for key, child in module.named_children()
            }
            steps |= expand(children)
        else:
            steps[name] = module
    return steps


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


def _network_of_blocks(
    blocks: Mapping[str, nn.Module], head: nn.Module | None, n_classes: int | None
) -> Network:
    blocks, head = copy.deepcopy((blocks, head))
    steps = expand(blocks)
    ends = {name: last_step(steps, name) for name in blocks}
    head_steps = {} if head is None else expand({"head": head})
    return Network(steps, head_steps, cut_points=ends)


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
    """Return the shape of one picture's feature map after each block.

    Parameters
    ----------
    blocks : mapping of str to Module
        In evaluation mode, with or without numbers in them (torch's "meta" device).
    size : int
        Height and width of the picture.

    Returns
    -------
    dict of str to tuple of int
        (c, h, w), or (d,) after a fully connected layer.
    """
    parameters = chain.from_iterable(block.parameters() for block in blocks.values())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    feature_map = torch.zeros(1, 3, size, size, device=device)
    shapes = {}
    for name, block in blocks.items():
        feature_map = block(feature_map)  # (1, c, h, w)
        shapes[name] = tuple(feature_map.shape[1:])
    return shapes
