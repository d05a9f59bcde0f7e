"""Configuration of an extraction: everything but the images that features depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import PIL
import torch
from torch import Tensor

from skltl.images import ImageSource, Preprocessing
from skltl.inference._frozen import FrozenPrefix, is_before_batch_norm
from skltl.inference._torch import InFlight, can_pool, n_pooled
from skltl.networks import (
    Backbone,
    ImageSize,
    Layout,
    layouts,
    prefix_digests,
    resolve_layer,
    skeleton,
)

# By the number of views of an image, the number of its crops. Further views are their
# mirror images.
N_CROPS = {1: 1, 2: 1, 10: 5}

# To be raised when the way in which features are computed or stored changes: features
# of other formats are never read.
FORMAT = 4


@dataclass(frozen=True)
class ExtractionConfig:
    """Configuration of the extraction of features from images.

    Features are taken after each of `blocks`, side by side; `network` extends at least
    to the last of them. `decode` changes the images, not what is computed from them,
    so it is no part of the fingerprints.
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
    n_views: int = 1  # of each image, whose features are averaged

    def scaled(self, source: ImageSource) -> ImageSource:
        """Return the source at the scale at which files are decoded.

        Resizing needs twice the size of the result to stay sharp.
        """
        if self.decode == "exact":
            return source
        size = self.preprocessing.size_for_crops(N_CROPS[self.n_views])
        return source.reduced_to(2 * max(size))

    def layouts(self) -> dict[str, Layout]:
        """Return the layouts of the outputs of the blocks."""
        return layouts(self.backbone, self.preprocessing.size, self.blocks)

    def widths(self) -> list[int]:
        """Return the number of features at each of the blocks."""
        return [n_pooled(layout, self.pooling) for layout in self.layouts().values()]

    def start(self, pixels: Tensor) -> InFlight:
        """Start to compute the features of a batch; a GPU continues on its own."""
        return InFlight(self.compute(pixels))

    def compute(self, pixels: Tensor) -> Tensor:
        """Return the features (n, d), float32, on the device, of pixels (n, h, w, c).

        The pixels are resized and cropped, in uint8 or float32; of several crops of
        each image, (n, n_crops, h, w, c).
        """
        if self.n_views == 1:
            return self._features(pixels)
        crops = pixels.unbind(1) if pixels.ndim == 5 else (pixels,)
        views = [view for crop in crops for view in (crop, crop.flip(2))]
        return torch.stack([self._features(view) for view in views]).mean(dim=0)

    def _features(self, pixels: Tensor) -> Tensor:
        """Return the features (n, d) of one view (n, h, w, c) of each image."""
        mains = main_layouts(self.backbone, self.preprocessing.size, self.pooling)
        runner = self.network.runner(
            self.device, self.dtype, self.layouts(), self.engine, mains
        )
        mean = _per_channel(self.preprocessing.mean, self.device)
        std = _per_channel(self.preprocessing.std, self.device)
        features = runner.features(pixels, mean, std, self.pooling)
        expected = (len(pixels), sum(self.widths()))
        if features.shape != expected:
            raise ValueError(
                f"The network returns features of shape {tuple(features.shape)} for "
                f"{len(pixels)} images; expected {expected}."
            )
        return features


@lru_cache(maxsize=128)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value per channel as a tensor (c, 1, 1).

    Cached, since a copy to a GPU waits for the GPU.
    """
    # Not the user's default dtype.
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def main_layouts(
    backbone: Backbone, image_size: ImageSize, pooling: str | int
) -> dict[str, Layout]:
    """Return the blocks of the main layers before which images do not vanish.

    With automatic pooling, the last one is followed by a part of the network's head.
    """
    network = skeleton(backbone, image_size)
    blocks = [
        resolve_layer(backbone, name, image_size, pooling).block
        for name in network.layers
    ]
    found = network.layouts
    return {block: found[block] for block in blocks if block in found}


def recorded_blocks(
    backbone: Backbone, asked: Sequence[str], image_size: ImageSize, pooling: str | int
) -> tuple[str, ...]:
    """Return the blocks whose features a cache stores where some are requested.

    Pooled features are small, so those of all main layers are stored with them: a
    search over layers runs the network once. Whole feature maps, and layers between the
    main ones, are stored only if they are requested.
    """
    mains = main_layouts(backbone, image_size, pooling)
    if pooling == "flatten" or not set(asked) <= mains.keys():
        return tuple(asked)
    blocks = skeleton(backbone, image_size).blocks

    def is_harmless(block: str) -> bool:
        can = can_pool(mains[block], pooling)
        return can and not is_before_batch_norm(blocks, block)

    return tuple(block for block in mains if block in asked or is_harmless(block))


def describe(config: ExtractionConfig, block: str) -> str:
    """Describe the features of a block for people, as JSON."""
    mains = skeleton(config.backbone, config.preprocessing.size).layers
    names = {main_block: name for name, main_block in mains.items()}
    digests = prefix_digests(config.backbone, config.network.blocks)
    preprocessing = config.preprocessing
    mean, std = (
        " ".join(f"{value:.4g}" for value in values)
        for values in (preprocessing.mean, preprocessing.std)
    )
    views = f", {config.n_views} views" if config.n_views > 1 else ""
    before, size = map(_as_text, (preprocessing.size_before_crop, preprocessing.size))
    facts = {
        "backbone": config.backbone.name,
        "layer": names.get(block, block),
        "depth": list(config.network.blocks).index(block) + 1,
        "pooling": config.pooling,
        "image_size": size,
        "batch_size": config.batch_size,
        "device": config.device.type,
        "precision": str(config.dtype).removeprefix("torch."),
        "engine": config.engine,
        "preprocessing": (
            f"resize {before} {preprocessing.interpolation}, {preprocessing.mode} crop "
            f"{size}, mean {mean}, std {std}{views}"
        ),
        "network": digests[block].hex()[:8],
    }
    return json.dumps(facts, default=int)


def _as_text(size: tuple[int, int]) -> int | str:
    """Return the side of a square, or height and width as text."""
    return size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"


def fingerprints(config: ExtractionConfig) -> list[str]:
    """Return, for each of the blocks, a digest of all that its features depend on."""
    digests = prefix_digests(config.backbone, config.network.blocks)
    facts = {
        "format": FORMAT,
        "preprocessing": asdict(config.preprocessing),
        "pooling": config.pooling,
        "batch size": config.batch_size,
        "device": _hardware(config.device),
        "dtype": str(config.dtype),
        "Pillow, which resizes": PIL.__version__,
        "settings of torch": _torch_settings(),
    }
    if config.engine != "torch":
        is_openvino = config.engine == "openvino"
        facts["engine"] = [config.engine, version("openvino") if is_openvino else ""]
    if config.engine == "openvino" and config.pooling == "flatten":
        # Whole feature maps are outputs only where they are requested, and OpenVINO
        # fuses nothing across an output.
        facts["all blocks"] = sorted(config.blocks)
    if config.n_views > 1:
        facts["views"] = config.n_views
    found = []
    for block in config.blocks:
        own = {"network": digests[block].hex(), "splits": _splits(config, block)}
        # The user's integers may be numpy's.
        text = json.dumps(facts | own, default=int)
        found.append(blake2b(text.encode(), digest_size=16).hexdigest())
    return found


def _splits(config: ExtractionConfig, block: str) -> list[str]:
    """Return the requested blocks before `block` that change its last digits.

    A segment ends there, and separates what would be folded or fused.
    """
    blocks = config.network.blocks
    before = list(blocks)[: list(blocks).index(block)]
    mains = main_layouts(config.backbone, config.preprocessing.size, config.pooling)
    return [
        one
        for one in before
        if one in config.blocks
        and (
            is_before_batch_norm(blocks, one)
            or (config.engine != "torch" and one not in mains)
        )
    ]


def _hardware(device: torch.device) -> list[str]:
    """Describe the hardware as far as its kernels may differ in the last digits."""
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
        for library in ("ONEDNN", "DNNL")  # the old name is still read
        for name in ("MAX_CPU_ISA", "DEFAULT_FPMATH_MODE")
    ]
    return [*instructions, *limits]


def _torch_settings() -> list[str]:
    """Return the user's settings that torch's choice of kernels depends on."""
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
        *(
            backend.fp32_precision
            for backend in (
                backends,
                backends.cudnn.conv,
                backends.cuda.matmul,
                backends.mkldnn.conv,
                backends.mkldnn.matmul,
            )
        ),
    ]
    return list(map(str, settings))
