"""Running frozen networks: engines, pooling, configuration and persistence."""

from skltl.inference._config import (
    FORMAT,
    N_CROPS,
    ExtractionConfig,
    describe,
    fingerprints,
    main_layouts,
    recorded_blocks,
)
from skltl.inference._frozen import (
    FrozenPrefix,
    Runner,
    load_prefix,
    load_with_head,
    release_memory,
)
from skltl.inference._openvino import ENGINES, can_run, resolve_engine
from skltl.inference._state import (
    as_tensor,
    digest_of,
    from_format_2,
    head_from_state,
    head_state,
    prefix_from_state,
    prefix_reference,
    prefix_state,
)
from skltl.inference._torch import (
    POOLINGS,
    TOKEN_POOLINGS,
    InFlight,
    can_pool,
    n_in_flight,
    n_pooled,
    pool,
)

__all__ = [
    "ENGINES",
    "FORMAT",
    "N_CROPS",
    "POOLINGS",
    "TOKEN_POOLINGS",
    "ExtractionConfig",
    "FrozenPrefix",
    "InFlight",
    "Runner",
    "as_tensor",
    "can_pool",
    "can_run",
    "describe",
    "digest_of",
    "fingerprints",
    "from_format_2",
    "head_from_state",
    "head_state",
    "load_prefix",
    "load_with_head",
    "main_layouts",
    "n_in_flight",
    "n_pooled",
    "pool",
    "prefix_from_state",
    "prefix_reference",
    "prefix_state",
    "recorded_blocks",
    "release_memory",
    "resolve_engine",
]
