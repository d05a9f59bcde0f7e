"""The name of a fit, by which its checkpoint is found again."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from hashlib import blake2b
from types import CodeType, FunctionType
from typing import Any

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

# What the functions that a transform calls do is seen from some augmented views only.
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
    """Return the contents of some augmented views of the first image."""
    crop = foundation.preprocessing.crop(source[0])
    views = Views(crop[None], augment, N_VIEWS, seed=0)
    return b"".join(content_key(view) for view in views)


def description(value: Any, name: str) -> bytes:
    """Describe a parameter that may be an object or a function, by all it consists of.

    The same in other processes; never loaded again.

    Raises
    ------
    ValueError
        If it holds what cannot be described, such as an open file.
    """
    content = io.BytesIO()
    describer = _Describer(content)
    # Without a memory: whether two equal texts are one object is a matter of chance.
    describer.fast = True
    try:
        describer.dump(value)
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


class _Describer(pickle.Pickler):
    """Pickles functions by their code and what they enclose, tensors by their bytes."""

    def reducer_override(self, value: Any) -> Any:
        """Return what stands for such an object; others are pickled as usual."""
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            kind = (str(value.dtype), tuple(value.shape))
            return tuple, ((*kind, array.numpy().tobytes()),)
        if isinstance(value, FunctionType):
            enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
            defaults = (value.__defaults__, value.__kwdefaults__)
            return tuple, ((value.__qualname__, value.__code__, *defaults, enclosed),)
        if isinstance(value, CodeType):
            # The order of a set of texts is another one in each process.
            constants = [
                sorted(map(repr, one)) if isinstance(one, frozenset) else one
                for one in value.co_consts
            ]
            return tuple, ((value.co_code, constants, value.co_names),)
        return NotImplemented
