"""Display classes for fitted estimators; matplotlib is imported lazily."""

from skltl.displays._feature_map import FeatureMapDisplay
from skltl.displays._grad_cam import GradCAMDisplay
from skltl.displays._image_grid import ImageGridDisplay
from skltl.displays._layer_scores import LayerScoresDisplay
from skltl.displays._prediction_grid import PredictionGridDisplay
from skltl.displays._strategy import StrategyDisplay
from skltl.displays._training_history import TrainingHistoryDisplay
from skltl.displays._transfer_gain import TransferGainDisplay

__all__ = [
    "FeatureMapDisplay",
    "GradCAMDisplay",
    "ImageGridDisplay",
    "LayerScoresDisplay",
    "PredictionGridDisplay",
    "StrategyDisplay",
    "TrainingHistoryDisplay",
    "TransferGainDisplay",
]
