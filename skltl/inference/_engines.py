"""Engines: torch, torch.compile or OpenVINO run the frozen network.

An engine runs the segments between cut points, and returns the feature map of each.
The features of an image at one layer must not depend on which other layers are asked
for, since the cache keeps them for all. Where they do (whole maps by OpenVINO), the
fingerprint names these layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from skltl._locks import Lock
from skltl.exceptions import EngineError
from skltl.inference._packed import pack_convolutions
from skltl.networks import is_known_code

# A GPU copies and computes in the order in which it is told to. While it works on one
# batch, the CPU tells it what to do with the next, and prepares the one behind that: so
# the GPU never waits for the CPU. Its own copies, of 8-bit images and of features,
# take a few percent of the time of the network, and are not overlapped.
GPU_BATCHES = 3


def n_under_way(device: torch.device) -> int:
    """Return how many batches a device should have to work on at a time."""
    return GPU_BATCHES if device.type == "cuda" else 1


def send(batch: Tensor, device: torch.device) -> Tensor:
    """Bring a batch to a device; to a GPU without waiting until it is there.

    On torch's current stream, as all that follows.
    """
    if device.type != "cuda" or batch.is_cuda:
        return batch.to(device)
    # Only from memory that the operating system does not move can a GPU copy by itself.
    return batch.pin_memory().to(device, non_blocking=True)


class UnderWay:
    """Features that a device computes and copies to the CPU, while other work goes on.

    Parameters
    ----------
    rows : tensor of shape (n, d)
        On the device. A GPU may still have to compute them.
    """

    def __init__(self, rows: Tensor) -> None:
        self._arrival: Any = None
        if rows.device.type != "cuda":
            self._rows = rows.cpu()
            return
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        cuda: Any = torch.cuda
        # "blocking" sleeps; otherwise waiting would take a core from what decodes.
        event = cuda.Event(blocking=True)
        self._arrival = cuda.current_stream(rows.device).record_event(event)

    def wait(self) -> Tensor:
        """Return the features, on the CPU, as soon as they are there."""
        if self._arrival is None:
            return self._rows
        self._arrival.synchronize()
        return self._rows.clone()  # pinned memory is scarce, and is used again


Pool = Callable[[Tensor], Tensor]

# From a batch, and how to pool, to features by the blocks behind which they are taken.
Engine = Callable[[Tensor, Pool], Iterator[tuple[str, Tensor]]]

ENGINES = ("torch", "compile", "openvino")

# torch's compiler keeps what it has compiled by the code of `forward`, the same for all
# segments; past its usual 8 it would silently run them as they are.
MAX_COMPILED = 1024

# Of torch's own layers, those that torchvision's ConvNets consist of. OpenVINO converts
# them; of others that is not known before it is tried.
USUAL_LAYERS = frozenset(
    (
        *(nn.Sequential, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm),
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish),
        *(nn.Hardsigmoid, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        *(nn.Flatten, nn.Dropout, nn.Identity),
    )
)

# OpenVINO's threads do not exist in a forked child, which would wait for them for ever.
_process_of_openvino: int | None = None


def resolve_engine(
    engine: str, device: torch.device, blocks: Mapping[str, nn.Module]
) -> str:
    """Return what runs the network; ``"auto"`` is OpenVINO on a CPU that has it.

    But not for code of the user's own, which may do what a conversion does not see, nor
    for unusual layers.

    Raises
    ------
    EngineError
        If the engine cannot run here.
    """
    if engine == "auto":
        is_usual = all(map(_is_usual, blocks.values()))
        return "openvino" if is_usual and can_run("openvino", device) else "torch"
    obstacle = _obstacle(engine, device)
    if obstacle:
        raise EngineError(
            f"engine={engine!r} cannot run: {obstacle}. engine='auto' takes what can."
        )
    return engine


def can_run(engine: str, device: torch.device) -> bool:
    """Tell whether an engine can run on a device of this machine."""
    return not _obstacle(engine, device)


def _obstacle(engine: str, device: torch.device) -> str:
    """Say what keeps an engine from running, if anything does."""
    if engine != "openvino":
        return ""
    if find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'skltl[openvino]')"
    if device.type != "cpu":
        return f"it runs on CPUs, not on the device {str(device)!r}"
    if _process_of_openvino not in (None, os.getpid()):
        return (
            "this process is a forked child of one that has used OpenVINO, whose "
            "threads do not exist here"
        )
    return ""


def _is_usual(block: nn.Module) -> bool:
    """Tell whether a block is of known code, and its layers are the usual ones."""
    layers = (part for part in block.modules() if type(part).__module__[:6] == "torch.")
    return is_known_code(block) and all(type(one) in USUAL_LAYERS for one in layers)


def engine_version(engine: str) -> str:
    """Return the version of what computes, as far as torch's own does not say it."""
    return version("openvino") if engine == "openvino" else ""


def prepare_engine(
    engine: str,
    segments: Mapping[str, nn.Module],
    wanted: Sequence[str],
    dtype: torch.dtype,
) -> Engine:
    """Make segments of a network ready to run.

    Parameters
    ----------
    engine : {"torch", "compile", "openvino"}
        What runs them.
    segments : mapping of str to Module
        By the blocks behind which they end; frozen, on the device, channels last.
        They may be changed.
    wanted : sequence of str
        The blocks behind which features are taken.
    dtype : torch.dtype
        What to compute in; that of the segments.

    Returns
    -------
    callable
        From a batch (n, 3, h, w) and a pooling to the wanted blocks and the features
        (n, d) behind them, one after the other.
    """
    if engine == "openvino":
        return OpenVINOEngine(segments, wanted, dtype)
    if engine == "compile":
        return OneByOne({name: Compiled(one) for name, one in segments.items()}, wanted)
    for segment in segments.values():
        # Block by block, so that it does not depend on where segments end.
        for block in filter(is_known_code, segment.children()):
            pack_convolutions(block)
    return OneByOne(segments, wanted)


class OneByOne:
    """Segments that run one after the other.

    Parameters
    ----------
    segments : mapping of str to callable
        From a feature map to the next one.
    wanted : sequence of str
        The blocks behind which features are taken.
    """

    def __init__(
        self,
        segments: Mapping[str, Callable[[Tensor], Tensor]],
        wanted: Sequence[str],
    ) -> None:
        self._segments = segments
        self._wanted = wanted

    def __call__(self, batch: Tensor, pool: Pool) -> Iterator[tuple[str, Tensor]]:
        """Yield the features.

        Pooled at once: the next segment's in-place ReLU may overwrite the map.
        """
        for name, segment in self._segments.items():
            batch = segment(batch)
            if name in self._wanted:
                yield name, pool(batch)


class Compiled:
    """A segment compiled by torch, with its weights built in.

    Parameters
    ----------
    segment : Module
        Frozen.
    """

    def __init__(self, segment: nn.Module) -> None:
        self._run = torch.compile(segment, options={"freezing": True})

    def __call__(self, feature_map: Tensor) -> Tensor:
        """Return the next feature map.

        Raises
        ------
        EngineError
            If there is no C++ compiler.
        """
        from torch._dynamo import config
        from torch._inductor.exc import InductorError

        try:
            # Inference mode would forbid to build weights in.
            with config.patch(recompile_limit=MAX_COMPILED), torch.no_grad():
                found: Tensor = self._run(feature_map)
        except InductorError as error:
            raise EngineError(
                "engine='compile' needs a C++ compiler that torch can use: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return found


class OpenVINOEngine:
    """A network converted to OpenVINO, for the shape of the batches that it sees.

    Pooling is a part of what is converted: whole maps would be large to hand over. For
    the same reason it can be done behind all segments, wanted or not, so that the
    network is the same whichever of them are wanted.

    Parameters
    ----------
    segments : mapping of str to Module
        Frozen, on the CPU.
    wanted : sequence of str
        The blocks behind which features are taken.
    dtype : torch.dtype
        What to compute in.
    """

    def __init__(
        self,
        segments: Mapping[str, nn.Module],
        wanted: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self._segments = {name: one.float() for name, one in segments.items()}
        self._wanted = wanted
        self._precision = "bf16" if dtype == torch.bfloat16 else "f32"
        self._models: dict[Any, Any] = {}
        self._lock = Lock()

    def __call__(self, batch: Tensor, pool: Pool) -> Iterator[tuple[str, Tensor]]:
        """Yield the features, float32."""
        key = (tuple(batch.shape), str(pool))
        array = batch.float().contiguous().numpy()
        with self._lock:  # a request serves one thread at a time
            if key not in self._models:
                self._models[key] = self._converted(batch.shape, pool)
            names, request = self._models[key]
            found = request.infer([array], share_inputs=True)
            rows = {name: found[n].copy() for n, name in enumerate(names)}
        for name in self._wanted:
            yield name, torch.from_numpy(rows[name])

    def _converted(self, shape: Sequence[int], pool: Pool) -> tuple[list[str], Any]:
        from openvino.frontend import FrontEndManager, OpConversionFailure
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        global _process_of_openvino
        _process_of_openvino = os.getpid()
        is_large = getattr(pool, "keywords", {}).get("pooling") == "flatten"
        names = [one for one in self._segments if not is_large or one in self._wanted]
        network = _Pooled(self._segments, names, pool)
        # Not `openvino.convert_model`, which would ask whether it may send statistics.
        frontend = FrontEndManager().load_by_framework("pytorch")
        example = torch.zeros(tuple(shape), dtype=torch.float32, device="cpu")
        try:
            with (
                torch.device("cpu"),  # not the user's default device
                warnings.catch_warnings(),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                warnings.simplefilter("ignore")  # of torch.jit.trace, which they use
                decoder = TorchScriptPythonDecoder(network, example_input=(example,))
                model = frontend.convert(frontend.load(decoder))
        except (RuntimeError, OpConversionFailure) as error:
            raise EngineError(
                "engine='openvino' cannot convert this network; engine='torch' runs "
                f"all of them. {_gist(error)}"
            ) from error
        model.reshape(list(shape))
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = _core().compile_model(model, "CPU", settings)
        return names, compiled.create_infer_request()


class _Pooled(nn.Module):
    """A network that gives the pooled features behind some of its segments."""

    def __init__(
        self, segments: Mapping[str, nn.Module], names: Sequence[str], pool: Pool
    ) -> None:
        super().__init__()
        self._segments = nn.ModuleList(segments.values())
        self._is_wanted = [name in names for name in segments]
        self._pool = pool

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return the features; of copies, which an in-place ReLU does not change."""
        features = []
        for segment, is_wanted in zip(self._segments, self._is_wanted, strict=True):
            batch = segment(batch)
            if is_wanted:
                features.append(self._pool(batch.clone()))
        return tuple(features)


def _gist(error: Exception) -> str:
    """Return the lines of OpenVINO's message that name what it cannot convert."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("-- ") and "aten::" in line]
    return " ".join(line.partition("with a message")[0] for line in named) or lines[0]


@cache
def _core() -> Any:
    from openvino import Core

    return Core()


def ends_of_segments(
    names: Sequence[str], wanted: Sequence[str], mains: Sequence[str], engine: str
) -> list[str]:
    """Return the blocks behind which segments end.

    Eager torch computes the same wherever it is cut; others fuse what lies between two
    cuts, so they are cut at all main cut points in any case.
    """
    ends = set(wanted) if engine == "torch" else {*wanted, *mains}
    return [name for name in names if name in ends]
