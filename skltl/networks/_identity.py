"""A name for what a network computes up to a block, from its structure and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torchvision
from torch import Tensor, nn

from skltl import __version__
from skltl._locks import Lock
from skltl.networks._backbone import Backbone, has_hooks

# Classes of these packages compute what their versions say.
# Of others the code is not known.
KNOWN_PACKAGES = ("torch", "torchvision", "skltl")

# What every module has besides its own attributes.
NO_ATTRIBUTES = frozenset(vars(nn.Module()))

_PLAIN = (type(None), bool, int, float, str, torch.dtype)

_digests: WeakKeyDictionary[nn.Module, tuple[bytes, bool]] = WeakKeyDictionary()
_lock = Lock()


def is_known_code(module: nn.Module) -> bool:
    """Tell whether a module runs code of torch, torchvision and skltl only."""
    return all(
        type(part).__module__.partition(".")[0] in KNOWN_PACKAGES
        and not has_hooks(part)
        for part in module.modules()
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages whose code networks consist of."""
    return {
        "skltl": __version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def prefix_digests(
    backbone: Backbone, blocks: Mapping[str, nn.Module]
) -> dict[str, bytes]:
    """Name what a network computes up to each block.

    Parameters
    ----------
    backbone : Backbone
        The network's record. Its token is part of the names from the first block on
        that runs code which neither torch, torchvision nor skltl brings.
    blocks : mapping of str to Module
        Frozen, from the network's first block on.

    Returns
    -------
    dict of str to bytes
        Equal names at equal places mean equal functions, in all processes with the same
        versions of skltl, torch and torchvision.
    """
    chain = repr(sorted(versions().items())).encode()
    names = {}
    for name, block in blocks.items():
        digest, is_known = _block_digest(block)
        token = "" if is_known else backbone.token
        link = f"{name}\0{token}".encode() + digest
        chain = blake2b(chain + link, digest_size=16).digest()
        names[name] = chain
    return names


def structure(blocks: Mapping[str, nn.Module]) -> list[list[Any]]:
    """Describe the layers of blocks as plain data: all but their weights.

    Returns
    -------
    list of [str, str, dict]
        Path, class and settings of each. Classes go without their module, which is for
        their package to choose.
    """
    return [
        [f"{name}.{path}", type(module).__qualname__, _settings(module)]
        for name, block in blocks.items()
        for path, module in block.named_modules(remove_duplicate=False)
    ]


def _settings(module: nn.Module) -> dict[str, str]:
    """Return what the constructor of a module's class left, as text."""
    return {
        name: repr(value) if _is_plain(value) else _name_of(value)
        for name, value in sorted(_attributes(module).items())
    }


def _name_of(value: Any) -> str:
    """Name a function, or the class of anything else: texts without an address."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def _block_digest(block: nn.Module) -> tuple[bytes, bool]:
    """Name one frozen block, and tell whether the name says all.

    Of its numbers every bit counts, so they are read once.
    """
    with _lock:
        if block not in _digests:
            digest = blake2b(digest_size=16)
            for path, module in block.named_modules(remove_duplicate=False):
                kind = type(module)
                attributes = sorted(
                    (name, repr(value))
                    for name, value in _attributes(module).items()
                    if _is_plain(value)
                )
                module_line = (path, kind.__module__, kind.__qualname__, attributes)
                digest.update(f"{module_line}\n".encode())
            for name, tensor in _tensors(block):
                tensor_line = (name, tensor.dtype, tuple(tensor.shape))
                digest.update(f"{tensor_line}\n".encode())
                numbers = tensor.contiguous().reshape(-1).view(torch.uint8)
                digest.update(numbers.numpy().data)
            _digests[block] = digest.digest(), _is_known(block)
        return _digests[block]


def _tensors(block: nn.Module) -> list[tuple[str, Tensor]]:
    # Not the state dict, which leaves out buffers that are not persistent. What stands
    # at two places is named at both: where it stands is part of the structure.
    return [
        *block.named_parameters(remove_duplicate=False),
        *block.named_buffers(remove_duplicate=False),
    ]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what the constructor of a module's class left besides submodules."""
    found = vars(module)
    return {name: found[name] for name in found.keys() - NO_ATTRIBUTES}


def _is_known(block: nn.Module) -> bool:
    """Tell whether the class names, attributes and numbers say all that is computed."""
    return all(
        type(module).__module__.partition(".")[0] in KNOWN_PACKAGES
        and not has_hooks(module)
        and all(_is_plain(value) for value in _attributes(module).values())
        for module in block.modules()
    )


def _is_plain(value: Any) -> bool:
    """Tell whether a value's text is all there is to it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, _PLAIN)
