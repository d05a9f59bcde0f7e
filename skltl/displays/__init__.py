"""Pictures of what fitted objects hold; matplotlib is imported when one is drawn."""

from skltl.displays._layer_scores import LayerScoresDisplay
from skltl.displays._training_history import TrainingHistoryDisplay

__all__ = ["LayerScoresDisplay", "TrainingHistoryDisplay"]
