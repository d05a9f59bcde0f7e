"""Everything but the images that features depend on, as one record."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

import PIL
import torch
from torch import Tensor

from skltl.images import ImageSource, Preprocessing
from skltl.inference._engines import UnderWay, engine_version
from skltl.inference._frozen import FrozenPrefix, parts_a_fold
from skltl.inference._pooling import n_pooled, pool
from skltl.networks import (
    Backbone,
    block_shapes,
    prefix_digests,
    reached_main_blocks,
    skeleton,
)

# Raised when the way features are computed or stored changes: those of other formats
# are never read.
FORMAT = 3


@dataclass(frozen=True)
class Recipe:
    """How images become features.

    Parameters
    ----------
    backbone : Backbone
        The record of the network.
    network : FrozenPrefix
        The network, at least up to the last of `blocks`.
    blocks : tuple of str
        After which of its blocks features are taken, side by side.
    preprocessing : Preprocessing
        What the images go through first.
    pooling : str or int
        How feature maps become features; see `pool`.
    batch_size : int
        Images that cross the network together.
    device : torch.device
        Where the network runs.
    dtype : torch.dtype
        What it computes in.
    engine : {"torch", "compile", "openvino"}, default="torch"
        What runs it.
    decode : {"exact", "fast"}, default="exact"
        Whether files may be decoded at a smaller scale. This changes the images, not
        what is made of them, so it is no part of the fingerprints.
    """

    backbone: Backbone
    network: FrozenPrefix
    blocks: tuple[str, ...]
    preprocessing: Preprocessing
    pooling: str | int
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    engine: str = "torch"
    decode: str = "exact"

    def scaled(self, source: ImageSource) -> ImageSource:
        """Return the images at the scale at which they are to be decoded.

        Twice the size that the network sees is what resizing needs to stay sharp.
        """
        if self.decode == "exact":
            return source
        return source.reduced_to(2 * self.preprocessing.shorter_side)

    def widths(self) -> list[int]:
        """Count the features at each of the blocks."""
        shapes = block_shapes(self.backbone, self.preprocessing.crop_size, self.blocks)
        return [n_pooled(shapes[block], self.pooling) for block in self.blocks]

    def start(self, pixels: Tensor) -> UnderWay:
        """Begin to compute the features of a batch; a GPU goes on by itself."""
        return UnderWay(self.compute(pixels))

    def compute(self, pixels: Tensor) -> Tensor:
        """Return the features of a batch of images.

        Parameters
        ----------
        pixels : tensor of shape (n, h, w, 3)
            Resized and cropped; uint8 or float32.

        Returns
        -------
        tensor of shape (n, d)
            float32, on the device.
        """
        mains = tuple(skeleton(self.backbone).cut_points.values())
        runner = self.network.runner(
            self.device, self.dtype, self.blocks, self.engine, mains
        )
        mean = _by_channel(self.preprocessing.mean, self.device)
        std = _by_channel(self.preprocessing.std, self.device)
        rows = runner.features(pixels, mean, std, partial(pool, pooling=self.pooling))
        expected = (len(pixels), sum(self.widths()))
        if rows.shape != expected:
            raise ValueError(
                f"The network makes features of shape {tuple(rows.shape)} of "
                f"{len(pixels)} images; expected {expected}."
            )
        return rows

    def fingerprints(self) -> list[str]:
        """Name, for each of the blocks, all that its features depend on."""
        digests = prefix_digests(self.backbone, self.network.blocks)
        return [self._fingerprint(block, digests[block].hex()) for block in self.blocks]

    def about(self, block: str) -> str:
        """Say what the features at a block are, for people (JSON)."""
        mains = skeleton(self.backbone).cut_points
        names = {main_block: name for name, main_block in mains.items()}
        digests = prefix_digests(self.backbone, self.network.blocks)
        facts = {
            "backbone": self.backbone.name,
            "layer": names.get(block, block),
            "depth": list(self.network.blocks).index(block) + 1,
            "pooling": self.pooling,
            "image_size": self.preprocessing.crop_size,
            "batch_size": self.batch_size,
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "engine": self.engine,
            "preprocessing": _in_words(self.preprocessing),
            "network": digests[block].hex()[:8],
        }
        return json.dumps(facts, default=int)

    def _fingerprint(self, block: str, digest: str) -> str:
        facts = {
            "format": FORMAT,
            "network": digest,
            "cut between": self._inner_cuts(block),
            "preprocessing": asdict(self.preprocessing),
            "pooling": self.pooling,
            "batch size": self.batch_size,
            "device": _kind(self.device),
            "dtype": str(self.dtype),
            "Pillow, which resizes": PIL.__version__,
            "settings of torch": _settings_of_torch(),
        }
        if self.engine != "torch":
            facts["engine"] = [self.engine, engine_version(self.engine)]
        if self.engine == "openvino" and self.pooling == "flatten":
            # Whole maps are taken only where they are asked for, which changes what
            # OpenVINO fuses.
            facts["all cuts"] = sorted(self.blocks)
        # The user's numbers may be numpy's.
        text = json.dumps(facts, default=int)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def _inner_cuts(self, block: str) -> list[str]:
        """Return the cuts before a block that change its features' last digits.

        Those that part what is folded or fused.
        """
        blocks = self.network.blocks
        before = list(blocks)[: list(blocks).index(block)]
        mains = set(skeleton(self.backbone).cut_points.values())
        return [
            one
            for one in before
            if one in self.blocks
            and (
                parts_a_fold(blocks, one)
                or (self.engine != "torch" and one not in mains)
            )
        ]


def recorded_blocks(
    backbone: Backbone, asked: Sequence[str], crop_size: int, pooling: str | int
) -> tuple[str, ...]:
    """Return the blocks whose features a pass records when those of some are asked for.

    Pooled features are small, so all main cut points are recorded with the one that is
    asked for: a search over cut points needs a single pass. Whole maps, and what lies
    between main cut points, are recorded only where they are asked for.
    """
    mains = reached_main_blocks(backbone, crop_size)
    if pooling == "flatten" or not set(asked) <= set(mains):
        return tuple(asked)
    shapes = block_shapes(backbone, crop_size, mains)
    blocks = skeleton(backbone).blocks

    def is_harmless(block: str) -> bool:
        return can_pool(shapes[block], pooling) and not parts_a_fold(blocks, block)

    return tuple(block for block in mains if block in asked or is_harmless(block))


def can_pool(shape: Sequence[int], pooling: str | int) -> bool:
    """Tell whether what a block gives for an image can be pooled in this way."""
    if len(shape) != 3:
        return len(shape) == 1
    return isinstance(pooling, str) or pooling <= min(shape[1:])


def _in_words(preprocessing: Preprocessing) -> str:
    mean, std = (
        " ".join(f"{number:.4g}" for number in numbers)
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    return (
        f"resize {preprocessing.shorter_side} {preprocessing.interpolation}, "
        f"crop {preprocessing.crop_size}, mean {mean}, std {std}"
    )


@lru_cache(maxsize=128)
def _by_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Bring one number for each channel to a device, once: to a GPU copies wait."""
    # Not the user's default dtype.
    return torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1)


def _kind(device: torch.device) -> list[str]:
    """Name the hardware as far as its kernels may differ in the last digits."""
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    if device.type != "cpu":
        return [device.type]
    instructions = [torch.backends.cpu.get_cpu_capability()]
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.10
        capabilities: Any = torch.cpu.get_capabilities()
        instructions += [f"{name} {value}" for name, value in capabilities.items()]
    limits = [
        os.environ.get(f"{library}_{name}", "")
        for library in ("ONEDNN", "DNNL")  # the old name still counts
        for name in ("MAX_CPU_ISA", "DEFAULT_FPMATH_MODE")
    ]
    return [*instructions, *limits]


def _settings_of_torch() -> list[str]:
    """Return the user's settings on which torch's choice of kernels depends."""
    backends: Any = torch.backends
    settings = [
        torch.are_deterministic_algorithms_enabled(),
        backends.mkldnn.enabled,
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.matmul.allow_fp16_accumulation,
    ]
    precisions = [
        backend.fp32_precision
        for backend in (
            backends,
            backends.cudnn.conv,
            backends.cuda.matmul,
            backends.mkldnn.conv,
            backends.mkldnn.matmul,
        )
    ]
    return [str(setting) for setting in (*settings, *precisions)]
