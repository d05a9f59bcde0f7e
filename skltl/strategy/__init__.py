"""Data-driven selection of a transfer learning strategy."""

from skltl.strategy._advisor import StrategyAdvisor
from skltl.strategy._comparison import (
    check_backbones,
    find_losers,
    restrict_splits,
    subset_rows,
)
from skltl.strategy._rules import (
    MIN_LEAD,
    Strategy,
    recommend_strategy,
    relative_size,
    similarity_of,
    smallest_size,
)
from skltl.strategy._tasks import task_of
from skltl.strategy._transfer import TransferClassifier

__all__ = [
    "MIN_LEAD",
    "Strategy",
    "StrategyAdvisor",
    "TransferClassifier",
    "check_backbones",
    "find_losers",
    "recommend_strategy",
    "relative_size",
    "restrict_splits",
    "similarity_of",
    "smallest_size",
    "subset_rows",
    "task_of",
]
