"""The `weights` parameter: weights files, downloads, and loading into a network.

Files are checked, and read without executing code from them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from skltl._caller import user_stacklevel
from skltl._random import own_random_state, torch_defaults
from skltl.exceptions import (
    LicenseWarning,
    WeightsError,
    WeightsNotFoundError,
    nearest,
    quote,
    shorten,
)
from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    HubFile,
    PretrainedWeights,
    StoredWeights,
)
from skltl.networks._blocks import Block
from skltl.networks._building import as_network, build_skeleton, skeleton
from skltl.networks._network import ImageSize, Model, Network, state_of
from skltl.networks._registry import get_backbone
from skltl.networks._verification import check

# The second is an older name of the first.
DEFAULTS = ("pretrained", "imagenet")

# Height and width of the input of a network. The largest take gigabytes.
MAX_IMAGE_SIZE = 10_000

FILE_FORMATS = (".safetensors", ".pt", ".pth", ".bin")

# Errors that the readers raise on damaged files; they have no common base class.
_READ_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, struct.error, MemoryError),
)
TORCH_FILE_ERRORS = (pickle.UnpicklingError, *_READ_ERRORS)

# Keys under which training scripts store the state dict, beside an optimizer's.
STATE_DICT_KEYS = ("state_dict", "model")

# Prefixes of the keys of `DataParallel`, `torch.compile` and Lightning modules.
WRAPPERS = ("module.", "_orig_mod.", "model.")

# Parts of the names of licenses that permit research only.
NON_COMMERCIAL = ("-nc", "noncommercial", "apple-amlr", "seer-license")

_warned: set[tuple[str, str]] = set()

# A file may hold float64, or the two moments of an optimizer beside the weights. One
# that is much larger is damaged, or made to exhaust the memory.
MAX_SIZE_RATIO = 8
MAX_HEAD_BYTES = 2**30


def resolve_weights(
    backbone: Backbone, weights: str | os.PathLike[str] | None
) -> PretrainedWeights | None:
    """Return the weights given by a name or a file; ``None`` stands for random ones."""
    if weights is None:
        return None
    default = backbone.weights[0]
    if weights in DEFAULTS:
        return default
    known = {name: one for one in backbone.weights for name in (one.name, *one.aliases)}
    if str(weights) in known:
        return known[str(weights)]
    path = Path(weights).expanduser()
    if isinstance(weights, os.PathLike) or path.suffix in FILE_FORMATS:
        return PretrainedWeights(path.name, path, default.preprocessing)
    names = [*DEFAULTS, *(one.name for one in backbone.weights)]
    raise WeightsError(
        f"Unknown weights {quote(str(weights))} for {backbone.name!r}. "
        f"{nearest(str(weights), names)} A file's name must end in "
        f"{', '.join(FILE_FORMATS)} (of a .ckpt file, save the state dict alone); None "
        "gives random weights."
    )


def resolve_network(
    backbone: str | Backbone,
    weights: str | os.PathLike[str] | None,
    image_size: int | tuple[int, int] | None,
    crop: str | None = None,
) -> tuple[Backbone, PretrainedWeights | None, Preprocessing]:
    """Return the backbone, weights and preprocessing given by four parameters."""
    backbone = get_backbone(backbone)
    pretrained = resolve_weights(backbone, weights)
    if pretrained is not None:
        warn_of_license(backbone, pretrained)
    preprocessing = (pretrained or backbone).preprocessing
    if crop in ("squash", "pad"):  # all of the image, without a crop of it
        preprocessing = replace(preprocessing, mode=crop, resize_size=None)
    elif crop is not None:
        preprocessing = replace(preprocessing, mode=crop)
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    if max(preprocessing.size) > MAX_IMAGE_SIZE:
        raise ValueError(
            f"image_size={image_size!r}: sides are at most {MAX_IMAGE_SIZE} pixels."
        )
    return backbone, pretrained, preprocessing


def warn_of_license(backbone: Backbone, weights: PretrainedWeights) -> None:
    """Warn, once in a process, of weights that do not permit commercial use."""
    key = backbone.name, weights.name
    is_restricted = any(part in weights.license for part in NON_COMMERCIAL)
    if is_restricted and key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"The license of the weights {weights.name!r} of {backbone.name!r}, "
            f"{weights.license}, does not permit commercial use.",
            LicenseWarning,
            stacklevel=user_stacklevel(),
        )


def load_network(
    backbone: Backbone, weights: PretrainedWeights, image_size: ImageSize
) -> Network:
    """Build a network with pretrained weights, frozen, on the CPU, in float32.

    The head is that of the weights, whatever its number of classes. Weights are not
    checked to be finite: callers use `check_finite` on the blocks they need.
    """
    if isinstance(weights.source, StoredWeights):
        model = build_skeleton(backbone, image_size)
        model.load(weights.source.state)
        return as_network(backbone, model, image_size)
    if weights.source is None:
        with own_random_state(0):  # a constructor may draw what it then replaces
            model = backbone.own_network or _build(backbone, image_size)
        return _checked(backbone, model, image_size)
    path = _local_file(backbone, weights)
    expected = skeleton(backbone, image_size)
    n_bytes = sum(one.nbytes for one in expected.state().values())
    state = _remove_wrappers(expected, read_state(path, n_bytes))
    return _load_state(backbone, state, image_size, path)


def random_network(backbone: Backbone, seed: int, image_size: ImageSize) -> Network:
    """Build a frozen network with the weights drawn after ``torch.manual_seed(seed)``.

    The state of torch's global generator does not change.
    """
    with own_random_state(seed):
        model = _build(backbone, image_size)
        if _is_own(backbone):
            with torch_defaults():
                _reset_parameters(model.module)
    return _checked(backbone, model, image_size)


def _checked(backbone: Backbone, model: Model, image_size: ImageSize) -> Network:
    """Return a network as blocks, which are compared with the network once."""
    check(backbone, model, image_size)
    return as_network(backbone, model, image_size)


def check_finite(blocks: Iterable[Block], weights: PretrainedWeights) -> None:
    """Refuse weights that are not finite, and negative variances."""
    for key, value in state_of(blocks).items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{weights.source}: {key!r} holds NaN or infinity.")
        if key.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{weights.source}: {key!r} holds a negative variance.")


def _local_file(backbone: Backbone, weights: PretrainedWeights) -> Path:
    """Return the file of weights, downloaded if necessary."""
    source = weights.source
    if isinstance(source, HubFile):
        return _fetch_from_hub(backbone, source)
    if isinstance(source, str):
        return fetch(source)
    assert isinstance(source, Path)
    return source


def _fetch_from_hub(backbone: Backbone, file: HubFile) -> Path:
    """Return a file of the Hugging Face Hub, downloaded if necessary.

    ``HF_HOME`` and ``HF_HUB_OFFLINE`` have the meaning that they have for the Hub.
    """
    if not file.repository:
        raise WeightsNotFoundError(
            f"There are no pretrained weights for {backbone.name!r}. weights=None "
            "draws random ones, and a file can be given by its path."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_offline = False
    for name in file.names:
        try:
            path = hf_hub_download(
                *(file.repository, name),
                revision=file.revision,
                local_files_only=is_offline,
            )
            return Path(path)
        except (OSError, ValueError) as error:  # all errors of the Hub are among these
            last_error = error
            # Attempts to connect take long.
            is_offline = is_offline or isinstance(error, LocalEntryNotFoundError)
    raise WeightsNotFoundError(
        f"The weights of {backbone.name!r} could not be downloaded "
        f"({shorten(str(last_error), 120)}). On a machine with a network, download\n  "
        f"https://huggingface.co/{file.repository}/resolve/{file.revision or 'main'}/"
        f"{file.names[0]}\nand pass it as weights={file.names[0]!r}."
    ) from last_error


def fetch(url: str) -> Path:
    """Return the file of a URL in the folder of torch.hub, downloaded if necessary.

    The SHA-256 in its name is checked when it is downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.exists():
        return path
    sha256 = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if sha256 is None:
        raise WeightsError(f"The file name {path.name!r} has no SHA-256 to check.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It writes to a temporary file, checks the hash, then renames the file.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256[1])
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: wrong hash
        raise WeightsNotFoundError(
            f"The weights could not be downloaded ({error}). On a machine with a "
            f"network, download\n  {url}\nand put it here as\n  {path}"
        ) from error
    return path


def read_state(path: Path, n_bytes: int) -> dict[str, Tensor]:
    """Read a state dict as float32, for a network whose weights have `n_bytes`."""
    if path.suffix not in FILE_FORMATS:
        raise WeightsError(
            f"{path} is not a weights file: expected one of {', '.join(FILE_FORMATS)}."
        )
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on odd names
        raise WeightsNotFoundError(f"There is no weights file {path}.")
    if path.stat().st_size > MAX_SIZE_RATIO * n_bytes + MAX_HEAD_BYTES:
        raise WeightsError(
            f"{path} has {path.stat().st_size:,} bytes; the network needs {n_bytes:,}."
        )
    is_safetensors = path.suffix == ".safetensors"
    content = _read_safetensors(path) if is_safetensors else _read_torch_file(path)
    for key in STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path} holds no state dict, but a {type(content).__name__}."
        )
    return {key: _checked_tensor(key, value, path) for key, value in content.items()}


def _read_safetensors(path: Path) -> Any:
    """Return the content of a safetensors file."""
    try:
        # Not `load_file`, whose tensors map the file and would change with it.
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        # Readers disagree on which of two tensors of the same name to use.
        json.loads(content[8 : 8 + length], object_pairs_hook=_refuse_duplicates)
        return load(content)
    except (SafetensorError, *_READ_ERRORS) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file: {error}{_HINT_OF_A_DOWNLOAD}"
        ) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name occurs twice in its header")


def _read_torch_file(path: Path) -> Any:
    """Return the content of a file of `torch.save`, if it holds plain data only."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for part in archive.infolist():
                    # `torch.save` never compresses. A small file could unpack to a
                    # huge one.
                    if part.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"its part {part.filename!r} is compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only the refused names of torch's message, which goes on to recommend loading
        # the file unsafely.
        pattern = r"(?:GLOBAL|function|class) [`'\"<]?(?:class ')?([\w.]+)"
        names = ", ".join(dict.fromkeys(re.findall(pattern, str(error))))
        raise WeightsError(
            f"{path} holds more than tensors and was not loaded, because that would "
            "run code from the file. Save a state dict instead: "
            "torch.save(network.state_dict(), ...)."
            + (f" It refers to {names}." if names else "")
        ) from error
    except (*_READ_ERRORS, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"{path} is not a readable torch file: {error}{_HINT_OF_A_DOWNLOAD}"
        ) from error


_HINT_OF_A_DOWNLOAD = " Delete it if it was downloaded, to download it again."


def _checked_tensor(key: Any, value: Any, path: Path) -> Tensor:
    """Return a plain tensor, float32 if it is floating point."""
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise WeightsError(
            f"{path} is not a state dict: its entry {key!r} is a "
            f"{type(value).__name__}."
        )
    is_plain = value.layout is torch.strided and not (
        value.is_quantized or value.is_complex() or value.is_meta
    )
    # An expanded tensor of a few bytes can have the shape of terabytes.
    if not is_plain or value.nbytes > value.untyped_storage().nbytes():
        raise WeightsError(
            f"{path}: {key!r} is a {value.dtype} tensor ({value.layout})."
        )
    if not value.is_floating_point():
        return value.contiguous()
    return value.detach().to(torch.float32).contiguous()


def _is_own(backbone: Backbone) -> bool:
    """Return whether the network of a backbone is always built with its weights."""
    return backbone.base.weights[0].source is None


def _build(backbone: Backbone, image_size: ImageSize) -> Model:
    """Build a network with weights, on the CPU, in float32."""
    with torch_defaults():
        model = backbone.build(None, image_size)
    model.module.float()
    return model


def _reset_parameters(module: nn.Module) -> None:
    """Replace the weights that a network was built with by random ones."""
    for path, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
        elif list(part.parameters(recurse=False)):
            raise WeightsError(
                f"weights=None: the {type(part).__name__} {path!r} has parameters, but "
                "no method reset_parameters() that draws random values."
            )


def _remove_wrappers(expected: Network, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from all keys, until any key is known."""
    while state and expected.state().keys().isdisjoint(state):
        common = [one for one in WRAPPERS if all(key.startswith(one) for key in state)]
        if not common:
            break
        state = {key.removeprefix(common[0]): value for key, value in state.items()}
    return state


def _load_state(
    backbone: Backbone, state: dict[str, Tensor], image_size: ImageSize, path: Path
) -> Network:
    """Build a network with the weights of a state dict, and its number of classes."""
    network = skeleton(backbone, image_size)
    model = build_skeleton(backbone, image_size, _n_classes(network, state))
    if backbone.convert_state is not None:
        try:
            state = backbone.convert_state(state, model.module, image_size)
        except _READ_ERRORS as error:
            reason = " ".join(str(error).split())
            raise WeightsError(
                f"{path} does not fit {backbone.name!r}: {shorten(reason, 300)}"
            ) from error
    expected = model.state()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # files older than torch 0.4.1
            state[key] = torch.tensor(0)
    head = state_of([network.head]) if network.head is not None else {}
    # Of a network without the head, or with one for a number of classes that an own
    # network cannot have, the blocks can be used.
    has_no_head = bool(head) and head.keys().isdisjoint(state)
    has_other_head = head.keys() <= state.keys() and any(
        state[key].shape != expected[key].shape for key in head
    )
    if has_no_head or has_other_head:
        for key in head:
            expected.pop(key, None)
            state.pop(key, None)
    _check_fit(expected, state, backbone, path)
    model.load(state)
    if has_no_head or has_other_head:
        return replace(as_network(backbone, model, image_size), head=None)
    return _checked(backbone, model, image_size)


def _n_classes(network: Network, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a state dict, if it is not the usual one."""
    head = {} if network.head is None else state_of([network.head])
    matrices = [key for key, value in head.items() if value.ndim > 1]
    if not matrices or state.get(matrices[-1], torch.tensor(0)).ndim < 2:
        return None
    n_classes = len(state[matrices[-1]])
    return None if n_classes == len(head[matrices[-1]]) else n_classes


def _check_fit(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    backbone: Backbone,
    path: Path,
) -> None:
    """Refuse a state dict that does not fit the network; list the differences."""
    common = [key for key in expected if key in state]
    faults = {
        "missing": [shorten(key) for key in expected if key not in state],
        "unexpected": [shorten(key) for key in state if key not in expected],
        "of another shape": [
            f"{shorten(key)} {tuple(state[key].shape)} instead of "
            f"{tuple(expected[key].shape)}"
            for key in common
            if state[key].shape != expected[key].shape
        ],
        "of another dtype": [
            f"{shorten(key)} ({state[key].dtype})"
            for key in common
            if state[key].is_floating_point() != expected[key].is_floating_point()
        ],
    }
    listed = [
        f"{len(keys)} {fault}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for fault, keys in faults.items()
        if keys
    ]
    if listed:
        raise WeightsError(
            f"{path} does not fit {backbone.name!r}. Its entries: {'; '.join(listed)}."
        )
