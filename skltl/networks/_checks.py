"""Checks of the networks that users make backbones of."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import torch
from sklearn.utils import check_scalar
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from skltl.images import Preprocessing


def check_name(name: Any) -> None:
    """Raise an error if a backbone of the user cannot have this name."""
    check_scalar(name, "name", str)
    if name.startswith("timm:"):
        raise ValueError(f"name={name!r}: names that begin with 'timm:' are timm's.")


def check_preprocessing(preprocessing: Preprocessing) -> None:
    if not isinstance(preprocessing, Preprocessing):
        raise TypeError(
            f"preprocessing must be a Preprocessing, got {preprocessing!r}."
        )


def check_module(module: nn.Module, head: str | None) -> nn.Module:
    """Refuse what is not a module, or has no such head; unwrap a compiled one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}.")
    module = getattr(module, "_orig_mod", module)
    _check_parts("The network", module)
    paths = [path for path, _ in module.named_modules() if path]
    for path in paths:
        if any(map(_is_reserved, path.split("."))):
            raise ValueError(
                f"The network has a module with the path {path!r}: a name in it is a "
                "keyword of Python, or has quotes or backslashes. Rename the module."
            )
    for key, weight in module.state_dict(keep_vars=True).items():
        if isinstance(weight, Tensor) and (weight.is_meta or is_lazy(weight)):
            raise ValueError(
                f"The weights {key!r} of the network have no values. Load them, or run "
                "lazy modules once."
            )
    if head is not None:
        check_scalar(head, "head", str)
    if head is not None and head not in paths:
        raise ValueError(
            f"head={head!r} is not the path of a module of the network. The last ones "
            f"are {', '.join(paths[-3:])}."
        )
    return module


def check_layers(layers: Mapping[str, str] | None) -> None:
    """Refuse what is not a mapping of names to module paths."""
    if layers is None:
        return
    if not isinstance(layers, Mapping):
        raise TypeError(
            "layers must be a dictionary of names and module paths, got a "
            f"{type(layers).__name__}."
        )
    for name, path in layers.items():
        check_scalar(name, "A name in layers", str)
        check_scalar(path, f"layers[{name!r}]", str)
    if not layers:
        raise ValueError("layers is empty: a backbone needs at least one layer.")
    if "last" in layers:
        raise ValueError("layers: 'last' cannot name a layer.")


def check_blocks(blocks: Mapping[str, nn.Module]) -> None:
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
        is_taken = name in ("head", "last") or hasattr(nn.Sequential, name)
        if not name.isidentifier() or is_taken:
            raise ValueError(
                f"{name!r} cannot name a block: use letters, digits and '_', and "
                "neither 'head', 'last' nor the name of a method of torch modules."
            )
        _check_block(name, block)


def _check_block(name: str, block: nn.Module) -> None:
    """Refuse a value that is not a module, is empty, or depends on the whole batch."""
    if not isinstance(block, nn.Module):
        raise TypeError(
            f"The block {name!r} must be a torch module, got {type(block).__name__}."
        )
    if isinstance(block, nn.Sequential) and len(block) == 0:
        raise ValueError(f"The block {name!r} is empty.")
    _check_parts(f"The block {name!r}", block)


def _check_parts(what: str, module: nn.Module) -> None:
    """Refuse scripted modules, and those that use the statistics of each batch."""
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{what} has a module of TorchScript. Use the module that it was made "
                "from."
            )
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{what} has a batch-norm without running statistics: the features of "
                "an image would depend on the others in its batch."
            )


def _is_reserved(name: str) -> bool:
    """Return whether a module of this name cannot be called by generated code."""
    is_text = name.isprintable() and not any(map(name.count, '"\\'))
    return keyword.iskeyword(name) or not is_text
