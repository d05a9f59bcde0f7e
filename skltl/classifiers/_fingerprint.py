"""The name of a fit, by which its checkpoint is found again."""

from __future__ import annotations

import io
import pickle
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skltl.backbones import prefix_digests, structure, versions
from skltl.classifiers._foundation import Foundation
from skltl.classifiers._views import Views
from skltl.images import ImageSource, content_key, file_digest

# On these a fit does not depend, or they are told apart in another way.
LEFT_OUT = (
    *("augment", "head_init", "cache", "checkpoint", "n_jobs"),
    *("random_state", "verbose"),
)

# What a transform of an installed package does is seen from some augmented views only.
N_VIEWS = 8


def fingerprint(
    classifier: Any,
    source: ImageSource,
    arrays: Iterable[NDArray[Any] | None],
    foundation: Foundation,
    seed: int | None,
) -> str:
    """Name all that a fit depends on.

    Parameters
    ----------
    classifier : FineTunedCNNClassifier
        Its parameters, and with a warm start what it has learned.
    source : ImageSource
        The images, by their content.
    arrays : iterable of array or None
        What else there is for each image: labels, weights, groups.
    foundation : Foundation
        The network; left out if it is random and nobody can draw it again.
    seed : int or None
        The same for the same `random_state`; ``None`` if that is ``None``.

    Returns
    -------
    str
        Hexadecimal digits.

    Raises
    ------
    ValueError
        If it cannot be told what `augment` does.
    """
    digest = blake2b(repr((seed, sorted(versions().items()))).encode(), digest_size=16)
    params = classifier.get_params().items()
    digest.update(
        repr(sorted(one for one in params if one[0] not in LEFT_OUT)).encode()
    )
    digest.update(repr(foundation.preprocessing).encode())
    digest.update(repr(structure(foundation.blocks)).encode())
    for position in range(len(source)):
        digest.update(_image(source, position))
    for array in arrays:
        digest.update(repr(None if array is None else array.tolist()).encode())
    digest.update(description(classifier.head_init, "head_init"))
    if classifier.augment is not None:
        digest.update(description(classifier.augment, "augment"))
        digest.update(_views(classifier.augment, source, foundation))
    if classifier.weights is not None or seed is not None:
        digests = prefix_digests(foundation.backbone, foundation.blocks)
        digest.update(b"".join(digests.values()))
    if classifier.warm_start and hasattr(classifier, "head_"):
        for module in (*classifier.network_.blocks.values(), classifier.head_):
            for weights in module.state_dict().values():
                digest.update(weights.numpy().tobytes())
    return digest.hexdigest()


def _image(source: ImageSource, position: int) -> bytes:
    """Name an image by its content, of a file by all of its bytes."""
    path = source.path(position)
    if path is None:
        return content_key(source[position])
    return file_digest(path) or b""  # the error comes when it is read


def _views(augment: Any, source: ImageSource, foundation: Foundation) -> bytes:
    """Return the contents of augmented views of some images."""
    found = b""
    for number, position in enumerate(np.linspace(0, len(source) - 1, N_VIEWS)):
        crop = foundation.preprocessing.crop(source[int(position)])
        view = Views(crop[None], augment, N_VIEWS, seed=0).view(0, 1 + number)
        found += content_key(view)
    return found


def description(value: Any, name: str) -> bytes:
    """Describe a parameter that may be an object or a function, by all it consists of.

    The same in other processes; never loaded again.

    Raises
    ------
    ValueError
        If it holds what cannot be described, such as an open file.
    """
    content = io.BytesIO()
    try:
        _Describer(content).dump(value)
    except (
        *(pickle.PicklingError, TypeError, ValueError, AttributeError),
        RecursionError,
    ) as error:
        raise ValueError(
            f"checkpoint: it cannot be told what {name}={type(value).__name__} does, "
            "so an interrupted fit with another one might be taken for this one. Use "
            f"functions and objects that can be pickled. ({error})"
        ) from error
    return content.getvalue()


# Packages that are pickled by name wherever they are installed, not only in the folders
# of installed packages. What they do is seen from the augmented views.
BY_NAME = {"torch", "torchvision", "skltl", "numpy", "PIL", "builtins"}


class _Describer(pickle.Pickler):
    """Pickles what a value consists of, the code of the user's own functions included.

    Functions and classes of installed packages are pickled by name.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # Whether two equal texts are one object is a matter of chance: no memory.
        self.fast = True
        self._described: set[int] = set()  # functions that call themselves

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a set, whose order is another in each process."""
        if type(value) in (set, frozenset):
            return sorted(description(one, "a set") for one in value)
        return value.__name__ if isinstance(value, ModuleType) else None

    def reducer_override(self, value: Any) -> Any:
        """Return what stands for such an object; others are pickled as usual."""
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            kind = (str(value.dtype), tuple(value.shape))
            return tuple, ((*kind, array.numpy().tobytes()),)
        if isinstance(value, CodeType):
            return tuple, ((value.co_code, value.co_consts, value.co_names),)
        is_function = isinstance(value, FunctionType)
        if not (is_function or isinstance(value, type)) or _is_installed(value):
            return NotImplemented
        if id(value) in self._described:
            return tuple, ((value.__qualname__,),)
        self._described.add(id(value))
        return tuple, (_function(value) if is_function else _class(value),)


def _function(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function consists of, and the globals that it uses."""
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = (function.__defaults__, function.__kwdefaults__)
    known = function.__globals__
    names = sorted(set(_names_in(function.__code__)) & known.keys())
    used = {name: known[name] for name in names}
    return (function.__qualname__, function.__code__, *defaults, enclosed, used)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _class(value: type) -> tuple[Any, ...]:
    """Return what a class consists of, as far as it says what its objects do."""
    parts = {
        name: getattr(part, "__func__", getattr(part, "fget", part))
        for name, part in vars(value).items()
    }
    kept = {
        name: part
        for name, part in parts.items()
        if isinstance(part, FunctionType)
        or (not name.startswith("__") and isinstance(part, (int, float, str, tuple)))
    }
    return (value.__qualname__, value.__bases__, kept)


def _is_installed(value: Any) -> bool:
    """Tell whether a function or class is of Python or of an installed package."""
    if (value.__module__ or "").partition(".")[0] in BY_NAME:
        return True
    if isinstance(value, FunctionType):
        path = value.__code__.co_filename
    else:
        module = sys.modules.get(value.__module__)
        path = getattr(module, "__file__", None) or ""
    parts = Path(path).parts
    return path.startswith(("<frozen", sysconfig.get_path("stdlib"))) or any(
        folder in parts for folder in ("site-packages", "dist-packages")
    )
