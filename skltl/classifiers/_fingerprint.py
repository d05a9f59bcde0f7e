"""The name of a fit, by which its checkpoint is found again."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from skltl.backbones import prefix_digests
from skltl.classifiers._foundation import Foundation
from skltl.classifiers._views import Views
from skltl.images import ImageSource, content_key

# On these a fit does not depend, or they are told apart in another way.
LEFT_OUT = ("augment", "cache", "checkpoint", "n_jobs", "random_state", "verbose")

# What a transform does is seen from some variants; its text need not say it.
N_VARIANTS = 4


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
        The pictures: files by their state, others by their content.
    arrays : iterable of array or None
        What else there is for each picture: labels, weights, groups.
    foundation : Foundation
        The network; left out if it is random and nobody can draw it again.
    seed : int or None
        The same for the same `random_state`; ``None`` if that is ``None``.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    digest = blake2b(repr(seed).encode(), digest_size=16)
    params = classifier.get_params().items()
    digest.update(
        repr(sorted(one for one in params if one[0] not in LEFT_OUT)).encode()
    )
    for position in range(len(source)):
        digest.update(_picture(source, position))
    for array in arrays:
        digest.update(repr(None if array is None else array.tolist()).encode())
    if classifier.augment is not None:
        digest.update(_variants(classifier.augment, source, foundation))
    if classifier.weights is not None or seed is not None:
        digests = prefix_digests(foundation.backbone, foundation.blocks)
        digest.update(b"".join(digests.values()))
    if classifier.warm_start and hasattr(classifier, "head_"):
        for module in (*classifier.network_.blocks.values(), classifier.head_):
            for numbers in module.state_dict().values():
                digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def _picture(source: ImageSource, position: int) -> bytes:
    path = source.path(position)
    if path is None:
        return content_key(source[position])
    if not Path(path).exists():  # the error comes when it is read
        return b""
    stat = Path(path).stat()
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()


def _variants(augment: Any, source: ImageSource, foundation: Foundation) -> bytes:
    """Return the contents of some variants of the first picture."""
    crop = foundation.preprocessing.crop(source[0])
    views = Views(crop[None], augment, N_VARIANTS, seed=0)
    return b"".join(content_key(view) for view in views)
