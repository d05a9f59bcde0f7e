"""The torch engine: pooling, segments eager or compiled, and copies to and from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from skltl.exceptions import EngineError
from skltl.networks import Layout

# A GPU computes and copies in the order of its instructions. While it works on one
# batch, the CPU queues the next and prepares the third, so that the GPU never waits for
# the CPU. Its own copies take a few percent of the time of the network, and do not
# overlap with it.
GPU_BATCHES = 3

# torch caches compiled code by `forward`, which all segments share; past its default of
# 8 it would silently run them uncompiled.
MAX_COMPILED = 1024

# Values of a feature map that are converted to float32 at once.
CHUNK = 2**20


def _avgmax(feature_map: Tensor) -> Tensor:
    averages = feature_map.mean(dim=(2, 3))
    return torch.cat([averages, feature_map.amax(dim=(2, 3))], dim=1)


# Functions from feature maps (n, c, h, w) to features (n, d).
MAP_POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": partial(torch.mean, dim=(2, 3)),
    "max": partial(torch.amax, dim=(2, 3)),
    "avgmax": _avgmax,
}

# Poolings of the tokens of a transformer with a class token, the first token.
TOKEN_POOLINGS = ("cls", "cls+avg")

POOLINGS = (*MAP_POOLINGS, "flatten", *TOKEN_POOLINGS, "auto")


def pool(output: Tensor, pooling: str | int, layout: Layout) -> Tensor:
    """Pool an output of a network to float32 features (n, d) in memory of their own.

    Feature maps and tokens of parts of the image are pooled alike. An integer gives the
    average in each cell of a grid with that number of rows and columns. The features of
    a channel are adjacent, except for "avgmax", where all averages come first.
    "flatten" returns all values in the order of the output. Vectors (n, d) are returned
    as features.
    """
    if layout.is_vector or pooling == "flatten":
        return output.flatten(1).to(torch.float32, copy=True)
    if pooling == "auto":
        pooling = "cls" if layout.uses_class_token else "avg"
    if pooling == "cls":
        return layout.class_token(output).to(torch.float32, copy=True)
    if pooling == "cls+avg":
        parts = [pool(output, part, layout) for part in ("cls", "avg")]
        return torch.cat(parts, dim=1)
    pooled = [_pool_chunk(layout.as_map(one), pooling) for one in _chunks(output)]
    return torch.cat(pooled)


def _chunks(output: Tensor) -> Sequence[Tensor]:
    """Divide an output into few images each on a CPU, which are pooled at once.

    The memory of a float32 copy of all of a large feature map would be new to the
    process, and to get it takes ten times as long as the arithmetic. An exported
    network has no fixed number of images to divide.
    """
    if output.device.type != "cpu" or is_exporting():
        return [output]
    return torch.split(output, max(1, CHUNK // math.prod(output.shape[1:])))


def is_exporting() -> bool:
    """Return whether operations are recorded, for an export or a compiler."""
    jit: Any = torch.jit
    return torch.compiler.is_compiling() or jit.is_tracing()


def _pool_chunk(feature_map: Tensor, pooling: str | int) -> Tensor:
    # bfloat16 has 8 significant bits: sums of hundreds of values need more.
    feature_map = feature_map.float()
    if isinstance(pooling, str):
        return MAP_POOLINGS[pooling](feature_map)
    return adaptive_avg_pool2d(feature_map, int(pooling)).flatten(1)


@lru_cache(maxsize=1024)
def n_pooled(layout: Layout, pooling: str | int) -> int:
    """Return the number of features of an output of a network."""
    output = torch.empty(1, *layout.shape, device="meta")
    return pool(output, pooling, layout).shape[1]


def can_pool(layout: Layout, pooling: str | int) -> bool:
    """Return whether an output of a network can be pooled."""
    if layout.is_vector or pooling == "flatten":
        return True
    if layout.grid is None:
        return False
    if pooling in TOKEN_POOLINGS:
        return layout.n_prefix > 0
    return isinstance(pooling, str) or pooling <= min(layout.grid)


def run_segments(
    segments: Mapping[str, Callable[[Tensor], Tensor]],
    wanted: Mapping[str, Layout],
    batch: Tensor,
    pooling: str | int,
) -> dict[str, Tensor]:
    """Run segments one after the other; return the features of the wanted blocks.

    Segments are named by their last blocks.
    """
    features = {}
    for name, segment in segments.items():
        batch = segment(batch)
        if name in wanted:
            # Now, since the next segment may overwrite the output in place.
            features[name] = pool(batch, pooling, wanted[name])  # (n, d)
    return features


def compile_segment(segment: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile a frozen segment with its weights as constants."""
    compiled = torch.compile(segment, options={"freezing": True})

    def run(feature_map: Tensor) -> Tensor:
        from torch._dynamo import config
        from torch._inductor.exc import InductorError

        try:
            # Weights become constants only where gradients are off.
            with config.patch(recompile_limit=MAX_COMPILED), torch.no_grad():
                output: Tensor = compiled(feature_map)
        except InductorError as error:
            raise EngineError(
                "engine='compile' needs a C++ compiler that torch can use: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return output

    return run


def n_in_flight(device: torch.device) -> int:
    """Return the number of batches that a device should have at a time."""
    return GPU_BATCHES if device.type == "cuda" else 1


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Copy a batch to a device; to a GPU without waiting for the copy."""
    if device.type != "cuda" or batch.is_cuda:
        return batch.to(device)
    # A GPU can copy on its own only from pinned memory.
    return batch.pin_memory().to(device, non_blocking=True)


class InFlight:
    """Features (n, d) that a GPU may still be computing and copying to the CPU."""

    def __init__(self, features: Tensor) -> None:
        self._event: Any = None
        if features.device.type != "cuda":
            self._features = features.cpu()
            return
        self._features = torch.empty(
            features.shape, dtype=features.dtype, pin_memory=True
        )
        self._features.copy_(features, non_blocking=True)
        cuda: Any = torch.cuda
        # "blocking" sleeps; a busy wait would occupy a core that could decode images.
        event = cuda.Event(blocking=True)
        self._event = cuda.current_stream(features.device).record_event(event)

    def wait(self) -> Tensor:
        """Return the features on the CPU when they are complete."""
        if self._event is None:
            return self._features
        self._event.synchronize()
        return self._features.clone()  # pinned memory is scarce, and is reused
