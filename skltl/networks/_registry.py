"""Registry of backbones by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache

from torchvision.models import list_models

from skltl.exceptions import UnknownBackboneError, quote
from skltl.networks._backbone import Backbone
from skltl.networks._tiny import tiny_backbone
from skltl.networks._torchvision import list_torchvision, torchvision_backbone

_REGISTERED: dict[str, Backbone] = {}

MAX_NAMES_IN_MESSAGE = 12


def list_backbones() -> list[str]:
    """List the names accepted by the `backbone` parameter.

    Returns
    -------
    list of str
        ``"tiny"`` (shipped with skltl), the networks of torchvision, and the backbones
        added with :func:`register_backbone`.

    See Also
    --------
    register_backbone : Add a backbone of your own.

    Examples
    --------
    >>> from skltl import list_backbones
    >>> [name for name in list_backbones() if name.startswith("vgg16")]
    ['vgg16', 'vgg16_bn']
    """
    return ["tiny", *list_torchvision(), *_REGISTERED]


def register_backbone(backbone: Backbone, replace: bool = False) -> None:
    """Make a backbone of your own available under its name, in this process.

    Worker processes (``n_jobs``) do not know the name: there, pass the `Backbone`
    itself as the `backbone` parameter.

    Parameters
    ----------
    backbone : Backbone
        Backbone to add; see `Backbone.from_blocks`.
    replace : bool, default=False
        Whether to replace another backbone of this name that was added before.

    Raises
    ------
    TypeError
        If `backbone` is not a `Backbone`.
    ValueError
        If the name is taken.

    Examples
    --------
    >>> from torch import nn
    >>> from skltl import Backbone, Preprocessing, register_backbone
    >>> blocks = {"stem": nn.Conv2d(3, 8, 3, stride=2)}
    >>> mine = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))
    >>> register_backbone(mine)
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f"Expected a Backbone, got {type(backbone).__name__}.")
    if is_registered(backbone):
        return
    is_own = backbone.name in _REGISTERED
    if backbone.name in list_backbones() and not (replace and is_own):
        hint = " Pass replace=True to replace it." if is_own else ""
        raise ValueError(f"There is a backbone named {backbone.name!r} already.{hint}")
    _REGISTERED[backbone.name] = backbone


def is_registered(backbone: Backbone) -> bool:
    """Return whether the name of a backbone leads to this backbone."""
    is_known = backbone.name in list_backbones()
    return is_known and get_backbone(backbone.name) == backbone


def is_included(backbone: Backbone) -> bool:
    """Return whether a name leads to a backbone in every process."""
    name = backbone.name
    is_known = name not in _REGISTERED and name in list_backbones()
    return is_known and _included_backbone(name) == backbone


def get_backbone(backbone: str | Backbone) -> Backbone:
    """Return the backbone of a name; a `Backbone` is returned unchanged."""
    if isinstance(backbone, Backbone):
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(
            f"A backbone must be a name or a Backbone, got a {type(backbone).__name__}."
        )
    if backbone in _REGISTERED:
        return _REGISTERED[backbone]
    if backbone in list_backbones():
        return _included_backbone(backbone)
    if backbone in list_models():
        raise UnknownBackboneError(
            f"torchvision's {backbone!r} is not a network for image classification."
        )
    raise UnknownBackboneError(
        f"Unknown backbone {quote(backbone)}. {nearest(backbone, list_backbones())} "
        "skltl.list_backbones() gives all names; skltl.register_backbone adds your own."
    )


get_backbone.__module__ = "skltl.networks"  # the path in saved files


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint to similar known names, or else a list of known names."""
    names = list(known)
    shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE])
    more = ", ..." if len(names) > MAX_NAMES_IN_MESSAGE else ""
    return did_you_mean(name, names) or f"Known: {shown}{more}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the most similar names, or an empty string."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    names = " or ".join(repr(by_lower[one]) for one in found)
    return f"Did you mean {names}?" if names else ""


@cache
def _included_backbone(name: str) -> Backbone:
    """Return a backbone of skltl or torchvision, always the same object."""
    return tiny_backbone() if name == "tiny" else torchvision_backbone(name)
