"""Ordered named blocks: take networks apart, move numbers, freeze, find out shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from skltl._device import settle_in_forked_child


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
    settle_in_forked_child()  # the weights may be real ones
    parameters = chain.from_iterable(block.parameters() for block in blocks.values())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    feature_map = torch.zeros(1, 3, size, size, dtype=torch.float32, device=device)
    shapes = {}
    for name, block in blocks.items():
        feature_map = block(feature_map)  # (1, c, h, w)
        shapes[name] = tuple(feature_map.shape[1:])
    return shapes
