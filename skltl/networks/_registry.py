"""Which backbones there are, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache

from torchvision.models import list_models

from skltl.exceptions import UnknownBackboneError, quote
from skltl.networks._backbone import Backbone
from skltl.networks._tiny import embedded_backbone
from skltl.networks._torchvision import list_torchvision, torchvision_backbone

_REGISTERED: dict[str, Backbone] = {}


def list_backbones() -> list[str]:
    """List the names that the `backbone` parameter takes.

    Returns
    -------
    list of str
        ``"tiny"`` (shipped with skltl), torchvision's ConvNets, and your own.

    Examples
    --------
    >>> from skltl import list_backbones
    >>> [name for name in list_backbones() if name.startswith("vgg16")]
    ['vgg16', 'vgg16_bn']
    """
    return ["tiny", *list_torchvision(), *_REGISTERED]


def register_backbone(backbone: Backbone, replace: bool = False) -> None:
    """Make a backbone of your own available under its name, in this process.

    Worker processes (``n_jobs``) do not know the name: pass the `Backbone` itself as
    the `backbone` parameter there.

    Parameters
    ----------
    backbone : Backbone
        See `Backbone.from_blocks`.

    replace : bool, default=False
        Whether it may take the place of another one of your own with this name.

    Raises
    ------
    TypeError
        If it is no `Backbone`.
    ValueError
        If there is another backbone of this name.

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
        hint = " Pass replace=True to exchange it." if is_own else ""
        raise ValueError(f"There is a backbone named {backbone.name!r} already.{hint}")
    _REGISTERED[backbone.name] = backbone


def is_registered(backbone: Backbone) -> bool:
    """Tell whether a backbone's name leads to this backbone."""
    known = backbone.name in list_backbones()
    return known and get_backbone(backbone.name) == backbone


def get_backbone(backbone: str | Backbone) -> Backbone:
    """Return the record of a backbone given by name; a record is returned as it is.

    Raises
    ------
    UnknownBackboneError
        If no backbone has this name; it says which names are near.
    """
    if isinstance(backbone, Backbone):
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(
            f"A backbone must be a name or a Backbone, got a {type(backbone).__name__}."
        )
    if backbone in _REGISTERED:
        return _REGISTERED[backbone]
    if backbone in list_backbones():
        return _known_backbone(backbone)
    if backbone in list_models():
        raise UnknownBackboneError(
            f"torchvision's {backbone!r} is no ConvNet of classes of images; vision "
            "transformers and other networks are not supported yet."
        )
    raise UnknownBackboneError(
        f"Unknown backbone {quote(backbone)}. {nearest(backbone, list_backbones())} "
        "skltl.list_backbones() gives all names; skltl.register_backbone adds your own."
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names are nearest, or which there are if none is near."""
    shown = list(known)
    more = ", ..." if len(shown) > 12 else ""
    return near(name, shown) or f"Known: {', '.join(shown[:12])}{more}."


def near(name: str, known: Iterable[str]) -> str:
    """Ask whether one of the nearest names was meant; nothing if none is near."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    meant = " or ".join(repr(by_lower[one]) for one in found)
    return f"Did you mean {meant}?" if meant else ""


@cache
def _known_backbone(name: str) -> Backbone:
    return embedded_backbone() if name == "tiny" else torchvision_backbone(name)
