"""Registry of backbones by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from torchvision.models import list_models

from skltl.exceptions import UnknownBackboneError, nearest, quote
from skltl.networks._backbone import Backbone
from skltl.networks._timm import (
    PREFIX,
    config_stamp,
    is_known_to_timm,
    list_timm,
    timm_backbone,
)
from skltl.networks._tiny import tiny_backbone
from skltl.networks._torchvision import list_torchvision, torchvision_backbone

_REGISTERED: dict[str, Backbone] = {}


class BackboneInfo(NamedTuple):
    """A backbone, as listed by `list_backbones` with details."""

    name: str
    weights: str
    license: str
    image_size: int | tuple[int, int]


def list_backbones(pattern: str | None = None, *, details: bool = False) -> list[Any]:
    """List the names accepted by the `backbone` parameter.

    Parameters
    ----------
    pattern : str, default=None
        Pattern of names, in which ``*`` stands for any text. A pattern that begins with
        ``"timm:"`` lists the weights of timm, which are left out otherwise.
    details : bool, default=False
        Whether to list the default weights, their license and the image size with each
        name.

    Returns
    -------
    list of str or BackboneInfo
        ``"tiny"`` (shipped with skltl), the networks of torchvision, the backbones
        added with :func:`register_backbone`, or the names of timm. With `details`,
        named tuples of `name`, `weights`, `license` (empty if it is unknown) and
        `image_size`, which ``pandas.DataFrame`` turns into a table.

    Raises
    ------
    UnknownBackboneError
        If the names of timm are requested, and timm is not installed.

    See Also
    --------
    register_backbone : Add a backbone of your own.

    Examples
    --------
    >>> from skltl import list_backbones
    >>> list_backbones("vgg16*")
    ['vgg16', 'vgg16_bn']
    """
    is_timm = pattern is not None and pattern.startswith(PREFIX)
    names = list_timm() if is_timm else _listed()
    if pattern is not None:
        names = [name for name in names if fnmatchcase(name, pattern)]
    return list(map(_info, names)) if details else names


def _listed() -> list[str]:
    """Return all names but those of timm."""
    return ["tiny", *list_torchvision(), *_REGISTERED]


def _info(name: str) -> BackboneInfo:
    backbone = get_backbone(name)
    default = backbone.weights[0]
    size = default.preprocessing.crop_size
    return BackboneInfo(name, default.name, default.license, size)


def register_backbone(backbone: Backbone, replace: bool = False) -> None:
    """Make a backbone of your own available under its name, in this process.

    Worker processes (``n_jobs``) do not know the name: there, pass the `Backbone`
    itself as the `backbone` parameter.

    Parameters
    ----------
    backbone : Backbone
        Backbone to add; see `Backbone.from_module`.
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
    if backbone.name.startswith(PREFIX):
        raise ValueError(f"Names that begin with {PREFIX!r} are those of timm.")
    if backbone.name in _listed() and not (replace and is_own):
        hint = " Pass replace=True to replace it." if is_own else ""
        raise ValueError(f"There is a backbone named {backbone.name!r} already.{hint}")
    _REGISTERED[backbone.name] = backbone


def is_registered(backbone: Backbone) -> bool:
    """Return whether the name of a backbone leads to this backbone."""
    return _REGISTERED.get(backbone.name) == backbone or is_included(backbone)


def is_included(backbone: Backbone) -> bool:
    """Return whether a name leads to a backbone in every process."""
    name = backbone.name
    if name in _REGISTERED or not (name in _listed() or name.startswith(PREFIX)):
        return False
    try:
        return get_backbone(name) == backbone
    except UnknownBackboneError:  # its folder is gone
        return False


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
    if backbone.startswith(PREFIX):
        return _timm_backbone(backbone, config_stamp(backbone))
    if backbone in _listed():
        return _included_backbone(backbone)
    if backbone in list_models():
        raise UnknownBackboneError(
            f"torchvision's {backbone!r} is not a network for image classification."
        )
    if is_known_to_timm(backbone):
        raise UnknownBackboneError(
            f"Unknown backbone {quote(backbone)}. Did you mean {PREFIX + backbone!r}?"
        )
    raise UnknownBackboneError(
        f"Unknown backbone {quote(backbone)}. {nearest(backbone, _listed())} "
        "skltl.list_backbones() gives all names; skltl.register_backbone adds your own."
    )


get_backbone.__module__ = "skltl.networks"  # the path in saved files


@cache
def _included_backbone(name: str) -> Backbone:
    """Return a backbone of skltl or torchvision, always the same object."""
    return tiny_backbone() if name == "tiny" else torchvision_backbone(name)


@cache
def _timm_backbone(name: str, stamp: object) -> Backbone:
    """Return a backbone of timm, always the same object for the same configuration."""
    return timm_backbone(name)
