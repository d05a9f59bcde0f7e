"""Identity of a network: digests of what its blocks compute, and its structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torchvision
from torch import nn

from skltl import __version__
from skltl._locks import Lock
from skltl.networks._backbone import Backbone
from skltl.networks._blocks import Block, functions_of, layers_of, source_of
from skltl.networks._network import is_customized

# The code of these packages is identified by their versions. Of others, it is unknown.
KNOWN_PACKAGES = ("torch", "torchvision", "skltl", "timm")
PYTHON_PACKAGES = ("builtins", "_operator", "math")
KNOWN_OPERATORS = ("aten", "torchvision")

# The attributes that every module has.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

_PLAIN = (type(None), bool, int, float, str, torch.dtype)

_digests: WeakKeyDictionary[Block, tuple[bytes, bool]] = WeakKeyDictionary()
_lock = Lock()


def versions(blocks: Iterable[Block] = ()) -> dict[str, str]:
    """Return the versions of the packages that define the layers of blocks."""
    always = {
        "skltl": __version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }
    used = {_package(type(module)) for block in blocks for _, module in _modules(block)}
    optional = sorted(used & {"timm"})
    return always | {package: version(package) for package in optional}


def is_known_code(block: Block) -> bool:
    """Return whether a block runs code of torch, torchvision, timm and skltl only."""
    return all(map(_is_known_function, functions_of(block))) and all(
        _package(type(module)) in KNOWN_PACKAGES and not is_customized(module)
        for _, module in _modules(block)
    )


def prefix_digests(backbone: Backbone, blocks: Mapping[str, Block]) -> dict[str, bytes]:
    """Return, for each frozen block, a digest of the function from image to its output.

    Equal digests mean equal functions, in all processes with the same versions. From
    the first block with unknown code on, they include the token of the backbone.
    """
    chain = repr(sorted(versions().items())).encode()
    digests = {}
    for name, block in blocks.items():
        digest, is_complete = _block_digest(block)
        token = "" if is_complete else backbone.token
        link = f"{name}\0{token}".encode() + digest
        chain = blake2b(chain + link, digest_size=16).digest()
        digests[name] = chain
    return digests


def structure(blocks: Iterable[Block]) -> dict[str, Any]:
    """Return the structure of blocks as plain data.

    ``"layers"`` has the path, class name and settings of each layer. Class names
    exclude the module, which may change with a release of its package. ``"functions"``
    is a digest of how layers are connected.
    """
    digest = blake2b(digest_size=16)
    layers: list[list[Any]] = []
    for block in blocks:
        digest.update(source_of(block).encode())
        layers += [
            [path, type(module).__qualname__, _settings(module)]
            for path, module in _modules(block)
        ]
    return {"layers": layers, "functions": digest.hexdigest()}


def _settings(module: nn.Module) -> dict[str, str]:
    """Return the attributes of a module as text without memory addresses."""
    return {
        name: repr(value)
        if _is_plain(value)
        else getattr(value, "__qualname__", type(value).__qualname__)
        for name, value in sorted(_attributes(module).items())
    }


def _block_digest(block: Block) -> tuple[bytes, bool]:
    """Return the digest of a frozen block, and whether it identifies the block.

    Computed once, since it includes every bit of the weights.
    """
    with _lock:
        if block not in _digests:
            digest = blake2b(source_of(block).encode(), digest_size=16)
            digest.update(repr(sorted(versions([block]).items())).encode())
            for path, module in _modules(block):
                digest.update(_description(path, module))
            # Not the state dict, which excludes non-persistent buffers. A shared tensor
            # appears under each of its names, which are a part of the structure.
            for name, tensor in [
                *block.named_parameters(remove_duplicate=False),
                *block.named_buffers(remove_duplicate=False),
            ]:
                header = (name, tensor.dtype, tuple(tensor.shape))
                digest.update(f"{header}\n".encode())
                raw = tensor.contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
            _digests[block] = digest.digest(), _is_complete(block)
        return _digests[block]


def _modules(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a block, and the modules inside of them, by their paths."""
    for name, layer in layers_of(block).items():
        yield from layer.named_modules(prefix=name, remove_duplicate=False)


def _description(path: str, module: nn.Module) -> bytes:
    """Return the class and the plain attributes of a module as text."""
    kind = type(module)
    attributes = sorted(
        (name, repr(value))
        for name, value in _attributes(module).items()
        if _is_plain(value)
    )
    return f"{(path, kind.__module__, kind.__qualname__, attributes)}\n".encode()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module has besides those of every module."""
    found = vars(module)
    return {name: found[name] for name in found.keys() - _MODULE_ATTRIBUTES}


def _is_complete(block: Block) -> bool:
    """Return whether code, plain attributes and weights define what is computed."""
    return is_known_code(block) and all(
        _is_plain(value)
        for _, module in _modules(block)
        for value in _attributes(module).values()
    )


def _is_known_function(function: Any) -> bool:
    """Return whether a function, or method of tensors, is of a known package."""
    if isinstance(function, str):
        return True
    # The functions of ``torch.ops`` are named "namespace::name".
    operator = getattr(function, "overloadpacket", function)
    namespace, separator, _ = getattr(operator, "_qualified_op_name", "").partition(":")
    if separator:
        return namespace in KNOWN_OPERATORS
    name = getattr(function, "__module__", None) or type(function).__module__
    return name.partition(".")[0] in (*KNOWN_PACKAGES, *PYTHON_PACKAGES)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_plain(value: Any) -> bool:
    """Return whether the text of a value defines it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, _PLAIN)
