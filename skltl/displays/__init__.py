"""Pictures of what fitted objects hold; matplotlib is imported when one is drawn."""

from skltl.displays._layer_scores import LayerScoresDisplay

__all__ = ["LayerScoresDisplay"]
