"""How frozen networks run: folding, pooling, engines, and what a saved one holds."""

from skltl.inference._engines import (
    ENGINES,
    UnderWay,
    can_run,
    engine_version,
    n_under_way,
    resolve_engine,
)
from skltl.inference._frozen import (
    FrozenPrefix,
    Runner,
    load_prefix,
    load_with_head,
    parts_a_fold,
    release_memory,
)
from skltl.inference._pooling import POOLINGS, n_pooled, pool
from skltl.inference._recipe import FORMAT, Recipe, can_pool, recorded_blocks
from skltl.inference._state import (
    as_tensor,
    head_from_state,
    head_state,
    prefix_from_state,
    prefix_state,
)

__all__ = [
    "ENGINES",
    "FORMAT",
    "POOLINGS",
    "FrozenPrefix",
    "Recipe",
    "Runner",
    "UnderWay",
    "as_tensor",
    "can_pool",
    "can_run",
    "engine_version",
    "head_from_state",
    "head_state",
    "load_prefix",
    "load_with_head",
    "n_pooled",
    "n_under_way",
    "parts_a_fold",
    "pool",
    "prefix_from_state",
    "prefix_state",
    "recorded_blocks",
    "release_memory",
    "resolve_engine",
]
