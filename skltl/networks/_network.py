"""Networks: an ordered sequence of named blocks, and a head.

Truncating a network is slicing the sequence, extracting several layers is iterating
over it once, and freezing the first blocks is a slice again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skltl.networks._blocks import Block
from skltl.networks._layouts import Layout

ImageSize = tuple[int, int]  # height and width in pixels


def is_module(value: object) -> bool:
    """Return whether a value is a torch module, compiled ones included."""
    return isinstance(value, nn.Module)


def is_customized(module: nn.Module) -> bool:
    """Return whether calling a module does other things than its class says."""
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    return has_hooks or "forward" in vars(module)


def truncate(blocks: Mapping[str, Block], wanted: Sequence[str]) -> dict[str, Block]:
    """Return the blocks up to and including the last wanted one."""
    names = list(blocks)
    deepest = max(names.index(name) for name in wanted)
    return {name: blocks[name] for name in names[: deepest + 1]}


def state_of(blocks: Iterable[Block]) -> dict[str, Tensor]:
    """Return the state dict of some blocks, with the keys of the network."""
    return {key: value for block in blocks for key, value in block.state_dict().items()}


def freeze(blocks: Iterable[nn.Module]) -> None:
    """Set modules to eval mode and turn their gradients off."""
    for block in blocks:
        block.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Model:
    """A network as one module, and what its ``forward`` does not tell.

    `layers` maps the names of the main layers to module paths, from the image to the
    logits, and `aliases` maps further names to names or paths. `head` are the paths of
    the modules or weights that return the logits, if any. The first `n_prefix_tokens`
    tokens of a transformer belong to no part of the image; with `uses_class_token`, the
    head uses the first of them. `last_block` is where the network ends, if not at its
    head.

    With `finds_layers`, shapes tell the main layers that `layers` lacks; `stride` is
    that of the last feature maps, if it is known. A network is not trainable if its
    gradients are other than those of its calls. The children of a module that
    `is_sequence`, an ``nn.Sequential``, are used as they are, whatever they call.
    """

    __module__ = "skltl.networks"  # the path in saved files

    module: nn.Module
    layers: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    n_prefix_tokens: int = 0
    uses_class_token: bool = False
    last_block: str | None = None
    finds_layers: bool = False
    stride: int | None = None
    is_trainable: bool = True
    is_sequence: bool = False

    def state(self) -> dict[str, Tensor]:
        """Return the state dict of the network."""
        state: dict[str, Any] = self.module.state_dict()
        return {key: one for key, one in state.items() if isinstance(one, Tensor)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict without copying its tensors; it may lack some."""
        current: Any = OrderedDict(state)
        # A state dict without versions of its modules would count as an old one.
        current._metadata = getattr(self.module.state_dict(), "_metadata", {})
        self.module.load_state_dict(current, strict=False, assign=True)


@dataclass(frozen=True, eq=False)
class Network:
    """The blocks of a network, in the order of the forward pass, and its head.

    `layers` maps the name of each main layer to the block that computes it, and
    `aliases` maps further names to names or paths of layers. `paths` maps the paths of
    modules to the blocks that they end with, and `inside` those of other modules to the
    blocks inside of which they end. `layouts` are those of the blocks that images of a
    certain size reach; `limit` says why they reach no others. Blocks in `inner` end
    inside of modules. A network that is not trainable computes something else in train
    mode.
    """

    blocks: Mapping[str, Block]
    head: Block | None
    layers: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    limit: str = ""
    inner: frozenset[str] = frozenset()
    is_trainable: bool = True

    @property
    def parts(self) -> list[Block]:
        """The blocks and the head."""
        return [*self.blocks.values(), *([] if self.head is None else [self.head])]

    def logits(self, batch: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of a normalized batch (n, c, h, w)."""
        for part in self.parts:
            batch = part(batch)
        return batch

    def state(self) -> dict[str, Tensor]:
        """Return the state dict of the blocks and the head."""
        return state_of(self.parts)
