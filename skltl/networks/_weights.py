"""Weights: the `weights` parameter, files, downloads, and loading into a network.

Files are checked, and read without running any code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from skltl._random import own_random_state, torch_defaults
from skltl.exceptions import WeightsError, WeightsNotFoundError, quote, shorten
from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    Network,
    PretrainedWeights,
    freeze,
    load_state,
    state_of,
)
from skltl.networks._layers import build_skeleton, skeleton
from skltl.networks._registry import get_backbone, nearest

FILE_FORMATS = (".safetensors", ".pt", ".pth")

# What the readers were seen to raise on damaged files, which have no common class.
_READ_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, struct.error, MemoryError),
)
TORCH_FILE_ERRORS = (pickle.UnpicklingError, *_READ_ERRORS)

# Under these names training scripts keep the state dict beside an optimizer's.
STATE_DICT_KEYS = ("state_dict", "model")

# A file may hold float64, or an optimizer's two moments beside the weights, but not a
# thousand times of what a network needs: that is damage, or meant to fill the memory.
MOST_TIMES_NEEDED = 8
BYTES_OF_A_HEAD = 2**30


def fetch(url: str) -> Path:
    """Return the file of a URL in torch's hub folder; download it if it is not there.

    Parameters
    ----------
    url : str
        Its file name ends in the first digits of the file's SHA-256.

    Returns
    -------
    Path
        A file with this SHA-256.

    Raises
    ------
    WeightsNotFoundError
        If it cannot be downloaded. The error says what to put where by hand.
    WeightsError
        If a file of this name is there, but is not what the name says.
    """
    file_name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    digits = _sha256_digits(file_name)
    if not path.exists():
        _download(url, path, digits)
    if not sha256_of(path).startswith(digits):
        raise WeightsError(
            f"{path} is damaged: its SHA-256 does not start with {digits}. Delete it; "
            "it will be downloaded again."
        )
    return path


def read_state(path: Path, n_needed: int) -> dict[str, Tensor]:
    """Read a state dict, as float32, from a ``.safetensors``, ``.pt`` or ``.pth`` file.

    Parameters
    ----------
    path : Path
        The file.
    n_needed : int
        How many bytes the network's weights take, but for a head of another width.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    WeightsNotFoundError
        If there is no such file.
    WeightsError
        If it is of another format or damaged, far too large, or holds anything but a
        state dict: objects that need code to load are never loaded.
    """
    if path.suffix not in FILE_FORMATS:
        raise WeightsError(
            f"{path} is not a weights file: expected one of {', '.join(FILE_FORMATS)}."
        )
    if not _is_file(path):
        raise WeightsNotFoundError(f"There is no weights file {path}.")
    n_most = MOST_TIMES_NEEDED * n_needed + BYTES_OF_A_HEAD
    if path.stat().st_size > n_most:
        raise WeightsError(
            f"{path} has {path.stat().st_size:,} bytes; the network takes {n_needed:,}."
        )
    content = (
        _read_safetensors(path) if path.suffix == FILE_FORMATS[0] else _read_pt(path)
    )
    return _checked_state(content, path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL byte
        return False


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_digits(file_name: str) -> str:
    found = re.search(r"-([0-9a-f]{8,})\.", file_name)
    if found is None:
        raise WeightsError(f"The name {file_name!r} does not hold a SHA-256 to check.")
    return found[1]


def _download(url: str, path: Path, digits: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary file beside `path`, checks the hash, then renames it.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: wrong hash
        raise WeightsNotFoundError(
            f"The weights could not be downloaded ({error}). On a machine with a "
            f"network, download\n  {url}\nand put it here as\n  {path}"
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        # Not `load_file`, whose tensors are the file: they would change when it does.
        content = path.read_bytes()
        _check_names_are_single(content)
        return load(content)
    except (SafetensorError, *_READ_ERRORS) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file: {error}"
        ) from error


def _check_names_are_single(content: bytes) -> None:
    """Refuse a header in which a name stands twice: readers differ on which counts."""
    (length,) = struct.unpack_from("<Q", content)

    def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("a name stands twice in its header")
        return dict(pairs)

    json.loads(content[8 : 8 + length], object_pairs_hook=single)


def _check_not_compressed(path: Path) -> None:
    """Refuse what `torch.save` never writes: a file that unpacks to a larger one."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {part.filename!r} is compressed")


def _read_pt(path: Path) -> Any:
    try:
        _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors and was not loaded, because that would "
            "run code from the file. Save a state dict instead: "
            f"torch.save(network.state_dict(), ...).{_refused_names(error)}"
        ) from error
    except (*_READ_ERRORS, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is not a readable torch file: {error}") from error


def _refused_names(error: Exception) -> str:
    # Of torch's message only the names of what it refused. It goes on with advice to
    # load the file unsafely; not here.
    named = re.findall(
        r"(?:GLOBAL|function|class) [`'\"<]?(?:class ')?([\w.]+)", str(error)
    )
    return f" It asks for {', '.join(dict.fromkeys(named))}." if named else ""


def _checked_state(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path} holds no state dict, but a {type(content).__name__}."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path} is no state dict: its entry {key!r} is a "
                f"{type(value).__name__}."
            )
    return {key: _checked_tensor(key, value, path) for key, value in content.items()}


def _checked_tensor(key: str, value: Tensor, path: Path) -> Tensor:
    is_plain = value.layout is torch.strided and not (
        value.is_quantized or value.is_complex() or value.is_meta
    )
    # A few bytes can claim to be terabytes by repeating themselves.
    if not is_plain or value.nbytes > value.untyped_storage().nbytes():
        raise WeightsError(
            f"{path}: {key!r} is a {value.dtype} tensor ({value.layout})."
        )
    if not value.is_floating_point():
        return value.contiguous()
    return value.detach().to(torch.float32).contiguous()


DEFAULT = "imagenet"

# What `DataParallel`, `torch.compile` and Lightning modules put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")


def resolve_weights(
    backbone: Backbone, weights: str | os.PathLike[str] | None
) -> PretrainedWeights | None:
    """Find what a `weights` parameter means for a backbone.

    Parameters
    ----------
    backbone : Backbone
        For which.
    weights : str, path or None
        ``"imagenet"``, the name of weights of this backbone (also with torchvision's
        class before it, and ``"DEFAULT"``), or a file.

    Returns
    -------
    PretrainedWeights or None
        ``None`` for random ones.

    Raises
    ------
    WeightsError
        If there are none of this name.
    """
    if weights is None:
        return None
    default = backbone.weights[0]
    if weights == DEFAULT:
        return default
    known = {name: one for one in backbone.weights for name in (one.name, *one.aliases)}
    if str(weights) in known:
        return known[str(weights)]
    path = Path(weights).expanduser()
    if isinstance(weights, os.PathLike) or path.suffix in FILE_FORMATS:
        return PretrainedWeights(path.name, path, default.preprocessing)
    names = [DEFAULT, *(one.name for one in backbone.weights)]
    raise WeightsError(
        f"Unknown weights {quote(str(weights))} for {backbone.name!r}. "
        f"{nearest(str(weights), names)} A file's name must end in "
        f"{', '.join(FILE_FORMATS)} (of a .ckpt file, save the state dict alone); None "
        "gives random weights."
    )


def resolve_network(
    backbone: str | Backbone,
    weights: str | os.PathLike[str] | None,
    image_size: int | None,
) -> tuple[Backbone, PretrainedWeights | None, Preprocessing]:
    """Find what the parameters `backbone`, `weights` and `image_size` mean together.

    Returns
    -------
    backbone : Backbone
        The record.
    weights : PretrainedWeights or None
        ``None`` for random ones.
    preprocessing : Preprocessing
        That of the weights, for images of this size.

    Raises
    ------
    UnknownBackboneError, WeightsError
        If they name something that is not there.
    """
    record = get_backbone(backbone)
    pretrained = resolve_weights(record, weights)
    preprocessing = (pretrained or record).preprocessing
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    return record, pretrained, preprocessing


def load_network(backbone: Backbone, weights: PretrainedWeights) -> Network:
    """Build a backbone's network with trained weights, frozen, on the CPU, in float32.

    Raises
    ------
    WeightsError
        If the file cannot be had or read, or does not fit the network. A head for
        another number of classes fits. Whether the numbers are finite is for those to
        check who know which of them they use: `check_finite`.
    """
    if weights.source is None:
        with own_random_state(0):  # a constructor may draw what it then replaces
            network = backbone.own_network or _built(backbone)
    else:
        is_url = isinstance(weights.source, str)
        path = fetch(str(weights.source)) if is_url else Path(weights.source)
        n_needed = sum(one.nbytes for one in skeleton(backbone).state().values())
        state = _without_wrapper(backbone, read_state(path, n_needed))
        state = _renamed(backbone, state)
        network = _skeleton_that_fits(backbone, state, path)
        load_state({**network.blocks, **network.head}, state)
    freeze({**network.blocks, **network.head})
    return network


def random_network(backbone: Backbone, seed: int) -> Network:
    """Build a backbone's network, frozen, with its usual random weights.

    They are those that torch draws after ``torch.manual_seed(seed)``; the state of
    torch's global generator does not change.
    """
    with own_random_state(seed):
        network = _built(backbone)
        if backbone.weights[0].source is None:
            with torch_defaults():
                _forget(network)
    freeze({**network.blocks, **network.head})
    return network


def _built(backbone: Backbone) -> Network:
    """Build a network with weights, on the CPU, in float32."""
    with torch_defaults():
        network = backbone.build(None)
    for module in (*network.blocks.values(), *network.head.values()):
        module.float()
    return network


def _forget(network: Network) -> None:
    """Exchange the weights that a network was built with for random ones."""
    for name, module in {**network.blocks, **network.head}.items():
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
            elif list(part.parameters(recurse=False)):
                raise WeightsError(
                    f"weights=None: {type(part).__name__} in {name!r} has parameters, "
                    "but no method reset_parameters() that gives them random values."
                )


def _without_wrapper(backbone: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take away what wrappers put before all names, unless the backbone has it."""
    expected = skeleton(backbone).state().keys()
    while expected.isdisjoint(_renamed(backbone, state)):
        known = [one for one in WRAPPERS if all(key.startswith(one) for key in state)]
        if not known or not state:
            break
        state = {key.removeprefix(known[0]): value for key, value in state.items()}
    return state


def _renamed(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rename = backbone.rename_keys or str
    return {
        rename(key): value
        for key, value in state.items()
        if not key.startswith(backbone.needless_keys)
    }


def _skeleton_that_fits(
    backbone: Backbone, state: dict[str, Tensor], path: Path
) -> Network:
    """Build a network without numbers, with as many classes as the state dict has."""
    expected = skeleton(backbone).state()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # files older than torch 0.4.1
            state[key] = torch.tensor(0)
    network = build_skeleton(backbone, _other_n_classes(expected, state))
    if _has_another_head(network, state):
        # A network of the user's own is not built for other classes. Its blocks serve.
        head = state_of(network.head)
        network = replace(network, head={})
        state = {key: value for key, value in state.items() if key not in head}
    _check_fit(network.state(), state, backbone, path)
    return network


def _other_n_classes(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> int | None:
    """Return for how many classes a state dict is, if not for the usual number."""
    matrices = [key for key, value in expected.items() if value.ndim > 1]
    if not matrices or state.get(matrices[-1], torch.tensor(0)).ndim < 2:
        return None
    n_classes = len(state[matrices[-1]])
    return None if n_classes == len(expected[matrices[-1]]) else n_classes


def _has_another_head(network: Network, state: Mapping[str, Tensor]) -> bool:
    head = state_of(network.head)
    return head.keys() <= state.keys() and any(
        state[key].shape != value.shape for key, value in head.items()
    )


def check_finite(blocks: Mapping[str, nn.Module], weights: PretrainedWeights) -> None:
    """Refuse blocks with weights that are not finite, or variances below 0.

    Raises
    ------
    WeightsError
        It names the first of them.
    """
    for key, value in state_of(blocks).items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{weights.source}: {key!r} holds NaN or infinity.")
        if key.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{weights.source}: {key!r} holds a negative variance.")


def _check_fit(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    backbone: Backbone,
    path: Path,
) -> None:
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    common = [key for key in expected if key in state]
    misshapen = [
        f"{shorten(key)} {tuple(state[key].shape)} instead of "
        f"{tuple(expected[key].shape)}"
        for key in common
        if state[key].shape != expected[key].shape
    ]
    mistyped = [
        f"{shorten(key)} ({state[key].dtype})"
        for key in common
        if state[key].is_floating_point() != expected[key].is_floating_point()
    ]
    faults = {
        "missing": missing,
        "not known": extra,
        "of another shape": misshapen,
        "of another type": mistyped,
    }
    said = [
        f"{len(keys)} {fault}: {_listed(keys)}"
        for fault, keys in faults.items()
        if keys
    ]
    if said:
        raise WeightsError(
            f"{path} does not fit {backbone.name!r}. Its entries: {'; '.join(said)}."
        )


def _listed(keys: list[str]) -> str:
    shown = ", ".join(shorten(key) for key in keys[:3])
    return f"{shown}{', ...' if len(keys) > 3 else ''}"
