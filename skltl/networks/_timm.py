"""The networks of timm: weights, preprocessing, licenses and main layers.

A name is ``"timm:"`` and a name of timm: an architecture with or without the tag of its
weights (``"timm:resnet50.a1_in1k"``), a repository of the Hugging Face Hub
(``"timm:hf-hub:owner/name"``), or a folder (``"timm:local-dir:folder"``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from skltl._random import own_random_state
from skltl.exceptions import UnknownBackboneError, did_you_mean, quote, shorten
from skltl.images import Preprocessing, file_identity
from skltl.networks._backbone import Backbone, HubFile, PretrainedWeights
from skltl.networks._building import build_without_values
from skltl.networks._network import ImageSize, Model
from skltl.networks._recording import FORWARD_ERRORS
from skltl.networks._tiny import imagenet_names, unique

PREFIX = "timm:"
HUB, FOLDER = "hf-hub:", "local-dir:"

# The modes of `Preprocessing` by their names in timm.
MODES = {"center": "center", "squash": "squash", "border": "pad"}

# Files of weights in a repository or folder, in the order of preference.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.pt")

# The heads of these classify several branches, or the outputs of several stages: there
# is no place to cut between all other weights and the head.
HEADLESS = ("crossvit", "efficientvim")

# timm knows the names of classes of the weights for ImageNet only.
N_IMAGENET_CLASSES = 1000


def import_timm() -> Any:
    """Return the package, or raise an error that says how to install it."""
    if find_spec("timm") is None:
        raise UnknownBackboneError(
            "Backbones named 'timm:...' need the package timm: pip install "
            "'skltl[timm]'."
        )
    import timm.data

    return timm


@cache
def list_timm() -> list[str]:
    """Return the names of all weights of timm that can be loaded."""
    timm = import_timm()
    configs = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained()}
    return [PREFIX + name for name, config in configs.items() if _is_loadable(config)]


def is_known_to_timm(name: str) -> bool:
    """Return whether timm is installed and has a network of this name."""
    if find_spec("timm") is None:
        return False
    known: bool = import_timm().is_model(name.partition(".")[0])
    return known


def config_stamp(name: str) -> object:
    """Return what changes with the configuration of a backbone in a folder."""
    folder = name.removeprefix(PREFIX + FOLDER)
    if folder == name:
        return None
    try:
        return file_identity(str(Path(folder).expanduser() / "config.json"))
    except OSError:
        return None  # the error is that of reading it


def timm_backbone(name: str) -> Backbone:
    """Return the backbone of a name that begins with ``"timm:"``."""
    timm = import_timm()
    identifier = name.removeprefix(PREFIX)
    if identifier.startswith((HUB, FOLDER)):
        configs = {"own": _read_config(timm, identifier)}
    else:
        configs = _known_configs(timm, identifier)
    first = next(iter(configs.values()))
    n_channels, n_means = first["input_size"][0], len(first["mean"])
    if n_means != n_channels:
        raise UnknownBackboneError(
            f"{name!r} takes images of {n_channels} channels, and its configuration "
            f"has the mean of {n_means}."
        )
    weights = tuple(
        _pretrained(timm, identifier, tag, config) for tag, config in configs.items()
    )
    is_fixed = bool(first.get("fixed_input_size"))
    digest = blake2b(repr(sorted(first.items())).encode(), digest_size=16).hexdigest()
    size = weights[0].preprocessing.size
    builder = _Builder(identifier, digest, size, is_fixed)
    return Backbone(
        name,
        builder,
        weights[0].preprocessing,
        weights,
        convert_state=builder.convert,
        known_as=f"{name} {digest}",
    )


@dataclass(frozen=True)
class _Builder:
    """Builder of a network of timm.

    A network that `is_fixed` is built for images of one size, by default `usual_size`.
    `digest` is that of its configuration.
    """

    identifier: str
    digest: str
    usual_size: ImageSize
    is_fixed: bool

    def __call__(self, n_classes: int | None, image_size: ImageSize) -> Model:
        """Build a network."""
        module: Any = self.create(n_classes, image_size)
        has_class_token = getattr(module, "cls_token", None) is not None
        return Model(
            module,
            {info["module"]: info["module"] for info in module.feature_info},
            head=_head_of(self),
            n_prefix_tokens=getattr(module, "num_prefix_tokens", int(has_class_token)),
            uses_class_token=getattr(module, "global_pool", None) == "token",
            finds_layers=True,
            stride=module.feature_info[-1]["reduction"],
        )

    def convert(
        self, state: dict[str, Tensor], module: Any, image_size: ImageSize
    ) -> dict[str, Any]:
        """Translate a state dict from a file, in any layout that timm can read.

        Position embeddings are resized.
        """
        n_classes: Any = module.num_classes
        is_in_own_layout = not module.state_dict().keys().isdisjoint(state)
        if is_in_own_layout and state.keys().isdisjoint(_head_of(self)):
            n_classes = 0
        overlay = {"state_dict": state, "source": "", "custom_load": False}
        with own_random_state(0):
            loaded = self.create(
                n_classes,
                image_size,
                pretrained=True,
                pretrained_cfg_overlay={**overlay, "num_classes": n_classes},
            )
        return dict(loaded.state_dict())

    def create(
        self, n_classes: int | None, image_size: ImageSize, **options: Any
    ) -> nn.Module:
        """Build a network as a module of timm; options are those of timm."""
        if self.identifier.startswith(HEADLESS):
            n_classes = 0
        if n_classes is not None:
            options["num_classes"] = n_classes
        if self.is_fixed and image_size != self.usual_size:
            options["img_size"] = image_size
        try:
            module: nn.Module = import_timm().create_model(self.identifier, **options)
        except OSError as error:  # of a folder or repository
            raise _unreadable(self.identifier, error) from error
        return module


def _known_configs(timm: Any, identifier: str) -> dict[str, dict[str, Any]]:
    """Return the configurations of an architecture by tag, first that of the name."""
    architecture, _, tag = identifier.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise UnknownBackboneError(f"timm has no network {quote(architecture)}. {hint}")
    names = timm.list_pretrained(f"{architecture}.*")
    configs = {name.partition(".")[2]: timm.get_pretrained_cfg(name) for name in names}
    configs = {one: config for one, config in configs.items() if _is_loadable(config)}
    default = timm.get_pretrained_cfg(architecture)
    if default is None:  # an old name
        return {"": _read_config(timm, identifier)}
    if tag and tag not in configs:
        raise UnknownBackboneError(
            f"timm has no weights {quote(tag)} of {architecture!r} that can be loaded. "
            f"Known: {', '.join(configs) or 'none'}."
        )
    first = tag or (default.tag if default.tag in configs else next(iter(configs), ""))
    ordered = dict.fromkeys((first, *configs)) if configs else {"": None}
    return {one: configs.get(one, default).to_dict() for one in ordered}


def _is_loadable(config: Any) -> bool:
    """Return whether there is a file of weights in a format that skltl reads.

    On the Hub, all are safetensors files; elsewhere, some are in a format of their own.
    """
    return bool(config.hf_hub_id) or not config.custom_load


def _read_config(timm: Any, identifier: str) -> dict[str, Any]:
    """Return the configuration of a repository or folder."""
    try:
        model = build_without_values(lambda: timm.create_model(identifier))
    except (OSError, *FORWARD_ERRORS) as error:
        raise _unreadable(identifier, error) from error
    return dict(model.pretrained_cfg)


def _unreadable(identifier: str, error: Exception) -> UnknownBackboneError:
    """Return the error for a repository or folder that describes no network."""
    return UnknownBackboneError(
        f"The file config.json of {quote(PREFIX + identifier)} cannot be read, or "
        f"describes no network of timm: {shorten(str(error), 200)}"
    )


def _pretrained(
    timm: Any, identifier: str, tag: str, config: dict[str, Any]
) -> PretrainedWeights:
    """Return weights by their configuration."""
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    size = tuple(data["input_size"][1:])
    before = tuple(math.floor(side / data["crop_pct"]) for side in size)
    preprocessing = Preprocessing(
        crop_size=size[0] if size[0] == size[1] else size,
        resize_size=before[0] if before[0] == before[1] else before,
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        mode=MODES[data["crop_mode"]],
    )
    categories = tuple(config.get("label_names") or ())
    if not categories and config.get("num_classes") == N_IMAGENET_CLASSES:
        categories = unique(imagenet_names().values())
    return PretrainedWeights(
        tag,
        _source(identifier, config),
        preprocessing,
        categories,
        license=config.get("license") or "",
    )


def _source(identifier: str, config: dict[str, Any]) -> str | Path | HubFile:
    """Return the file of weights."""
    if identifier.startswith(FOLDER):
        folder = Path(identifier.removeprefix(FOLDER)).expanduser()
        known = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
        found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
        return next(iter([*known, *found]), folder / WEIGHTS_FILES[0])
    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    if not repository and config.get("url"):
        return str(config["url"])
    names = (config.get("hf_hub_filename"), *WEIGHTS_FILES)
    return HubFile(repository, tuple(name for name in names if name), revision or None)


@cache
def _head_of(builder: _Builder) -> tuple[str, ...]:
    """Return the names of the weights that a network for features does not have."""

    def names(n_classes: int | None) -> set[str]:
        module = build_without_values(
            lambda: builder.create(n_classes, builder.usual_size)
        )
        return set(module.state_dict())

    return tuple(sorted(names(None) - names(0)))
