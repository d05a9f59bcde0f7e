"""Which of a network's categories are which of the user's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl.backbones import imagenet_names, nearest
from skltl.exceptions import shorten


def map_of_names(
    class_map: Mapping[Any, Any], categories: Sequence[str]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a `class_map` that the user has written.

    Parameters
    ----------
    class_map : mapping
        For each class, one category or a list of them: names, numbers, or WordNet's
        numbers (``"n02085620"``).
    categories : sequence of str
        The names of the network's categories, in the order of the logits.

    Returns
    -------
    classes : array of shape (n_classes,)
        Sorted.
    shares : array of shape (n_categories, n_classes)
        1 where a category belongs to a class, else 0.

    Raises
    ------
    ValueError
        If there are less than two classes, a class is empty, or a category unknown or
        in two classes.
    """
    if len(class_map) < 2:
        raise ValueError(
            f"class_map needs at least two classes, got {_short(class_map)}."
        )
    kinds = {str if isinstance(name, str) else type(name) for name in class_map}
    if len(kinds) > 1 or not issubclass(kinds.pop(), (str, int, np.integer)):
        raise ValueError(
            "class_map: the classes must be all texts, or all integers; they are "
            f"{_short(list(class_map))}."
        )
    classes = np.unique(list(class_map))
    numbers = {name: number for number, name in enumerate(categories)}
    shares = np.zeros((len(categories), len(classes)))
    for column, name in enumerate(classes.tolist()):
        members = class_map[name]
        alone = isinstance(members, (str, Integral))
        if not alone and not isinstance(members, (list, tuple, set, np.ndarray)):
            raise ValueError(
                f"class_map: the class {_short(name)} must have a category or a list "
                f"of them, not {_short(members)}."
            )
        for member in [members] if alone else list(members):
            shares[_number(member, numbers, name), column] = 1
    if not shares.any(axis=0).all():
        empty = classes[~shares.any(axis=0)].tolist()[0]
        raise ValueError(f"class_map: the class {_short(empty)} has no category.")
    twice = np.flatnonzero(shares.sum(axis=1) > 1)
    if len(twice):
        raise ValueError(
            f"class_map: the category {categories[twice[0]]!r} is in two classes."
        )
    return classes, shares


def learned_map(
    probabilities: NDArray[np.float64],
    targets: NDArray[np.int64],
    weights: NDArray[np.floating[Any]],
    n_classes: int,
) -> NDArray[np.float64]:
    """Learn which categories the network sees in the pictures of each class.

    The expected empirical predictor [1]_: the probability of a class given a category,
    from the probabilities of categories that the network gives for the pictures.

    Parameters
    ----------
    probabilities : array of shape (n, n_categories)
        Of the categories, for each picture.
    targets : array of shape (n,)
        Number of the class of each picture.
    weights : array of shape (n,)
        Of the pictures.
    n_classes : int
        How many classes there are.

    Returns
    -------
    array of shape (n_categories, n_classes)
        Rows sum to 1.

    References
    ----------
    .. [1] Nguyen, Hassner, Seeger, Archambeau, "LEEP: a new measure to evaluate
       transferability of learned representations", ICML, 2020.
    """
    belongs = np.zeros((len(targets), n_classes))
    belongs[np.arange(len(targets)), targets] = weights
    together = probabilities.T @ belongs
    seen = together.sum(axis=1, keepdims=True)
    # A category that was never seen says nothing about the class.
    share = np.divide(
        together, seen, out=np.full_like(together, 1 / n_classes), where=seen > 0
    )
    return np.asarray(share)


def map_by_names(
    classes: NDArray[Any], categories: Sequence[str]
) -> dict[Any, str] | None:
    """Return a `class_map` if all classes are categories, by name or WordNet number."""
    known = set(categories)
    found = {}
    for name in classes.tolist():
        category = imagenet_names().get(name, name) if isinstance(name, str) else name
        if category not in known:
            return None
        found[name] = category
    return found


def _number(member: Any, numbers: Mapping[str, int], of_class: Any) -> int:
    """Return the number of a category that a user has named in some way."""
    is_count = isinstance(member, Integral) and not isinstance(member, (bool, np.bool_))
    if is_count and 0 <= int(member) < len(numbers):
        return int(member)
    if isinstance(member, str):
        name = imagenet_names().get(member, member)
        if name in numbers:
            return numbers[name]
    raise ValueError(
        f"class_map: {_short(member)}, of the class {_short(of_class)}, is no category "
        "of this "
        f"network: neither a name, nor a number from 0 to {len(numbers) - 1}, nor a "
        f"WordNet number such as n02085620. {nearest(str(member), list(numbers))}"
    )


def _short(value: Any) -> str:
    return shorten(repr(value))
