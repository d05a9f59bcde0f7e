"""Which strategy to use: what to train, and where to truncate."""

from skltl.strategy._advisor import StrategyAdvisor
from skltl.strategy._rules import (
    LARGE_N_IMAGES,
    LARGE_N_PER_CLASS,
    LEAD_THAT_COUNTS,
    Strategy,
    build_strategy,
    recommend_strategy,
    relative_size,
    similarity_of,
)
from skltl.strategy._transfer import TransferClassifier

__all__ = [
    "LARGE_N_IMAGES",
    "LARGE_N_PER_CLASS",
    "LEAD_THAT_COUNTS",
    "Strategy",
    "StrategyAdvisor",
    "TransferClassifier",
    "build_strategy",
    "recommend_strategy",
    "relative_size",
    "similarity_of",
]
