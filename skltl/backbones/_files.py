"""Weights files: found or downloaded, checked, and read without running any code."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from skltl.exceptions import WeightsError, WeightsNotFoundError

FILE_FORMATS = (".safetensors", ".pt", ".pth")

# What the readers were seen to raise on damaged files, which have no common class.
_READ_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, struct.error, MemoryError),
)
TORCH_FILE_ERRORS = (pickle.UnpicklingError, *_READ_ERRORS)

# Under these names training scripts keep the state dict beside an optimizer's.
WRAPPERS = ("state_dict", "model")

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
    for wrapper in WRAPPERS:
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
