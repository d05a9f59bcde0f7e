"""Image transfer learning as scikit-learn estimators.

The names below are imported when they are first used, so that ``import skltl`` does not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from skltl.cache import cache_info, clear_cache
    from skltl.curation import (
        ImageNeighbors,
        find_duplicates,
        find_label_errors,
        find_outliers,
    )
    from skltl.displays import (
        FeatureMapDisplay,
        GradCAMDisplay,
        ImageGridDisplay,
        LayerScoresDisplay,
        PredictionGridDisplay,
        StrategyDisplay,
        TrainingHistoryDisplay,
        TransferGainDisplay,
    )
    from skltl.export import export_onnx, export_openvino, to_torch
    from skltl.features import (
        CNNFeatureTransformer,
        ImageSetTransformer,
        make_feature_pipeline,
    )
    from skltl.finetuning import FineTunedCNNClassifier, FineTunedCNNRegressor
    from skltl.images import (
        Preprocessing,
        crop_images,
        drop_bad,
        find_bad_images,
        load_image_folder,
    )
    from skltl.inference import release_memory
    from skltl.networks import (
        Backbone,
        adapt_channels,
        list_backbones,
        list_layers,
        register_backbone,
    )
    from skltl.pretrained import PretrainedCNNClassifier
    from skltl.strategy import (
        Strategy,
        StrategyAdvisor,
        TransferClassifier,
        recommend_strategy,
    )

SKOPS_TRUSTED = [
    "skltl.CNNFeatureTransformer",
    "skltl.FineTunedCNNClassifier",
    "skltl.FineTunedCNNRegressor",
    "skltl.ImageNeighbors",
    "skltl.ImageSetTransformer",
    "skltl.PretrainedCNNClassifier",
    "skltl.Strategy",
    "skltl.StrategyAdvisor",
    "skltl.TransferClassifier",
    "skltl.features.FeatureScaler",
    "skltl.features.LinearSVC",
    "skltl.features.LogisticRegression",
    "skltl.features.Ridge",
]
"""Types to pass as ``trusted`` to ``skops.io.load`` for files of skltl's estimators."""

_SUBPACKAGES = {
    "Backbone": "networks",
    "CNNFeatureTransformer": "features",
    "FeatureMapDisplay": "displays",
    "FineTunedCNNClassifier": "finetuning",
    "FineTunedCNNRegressor": "finetuning",
    "GradCAMDisplay": "displays",
    "ImageGridDisplay": "displays",
    "ImageNeighbors": "curation",
    "ImageSetTransformer": "features",
    "LayerScoresDisplay": "displays",
    "PredictionGridDisplay": "displays",
    "Preprocessing": "images",
    "PretrainedCNNClassifier": "pretrained",
    "Strategy": "strategy",
    "StrategyAdvisor": "strategy",
    "StrategyDisplay": "displays",
    "TrainingHistoryDisplay": "displays",
    "TransferClassifier": "strategy",
    "TransferGainDisplay": "displays",
    "adapt_channels": "networks",
    "cache_info": "cache",
    "clear_cache": "cache",
    "crop_images": "images",
    "drop_bad": "images",
    "export_onnx": "export",
    "export_openvino": "export",
    "find_bad_images": "images",
    "find_duplicates": "curation",
    "find_label_errors": "curation",
    "find_outliers": "curation",
    "list_backbones": "networks",
    "list_layers": "networks",
    "load_image_folder": "images",
    "make_feature_pipeline": "features",
    "recommend_strategy": "strategy",
    "register_backbone": "networks",
    "release_memory": "inference",
    "to_torch": "export",
}

__all__ = [
    "SKOPS_TRUSTED",
    "Backbone",
    "CNNFeatureTransformer",
    "FeatureMapDisplay",
    "FineTunedCNNClassifier",
    "FineTunedCNNRegressor",
    "GradCAMDisplay",
    "ImageGridDisplay",
    "ImageNeighbors",
    "ImageSetTransformer",
    "LayerScoresDisplay",
    "PredictionGridDisplay",
    "Preprocessing",
    "PretrainedCNNClassifier",
    "Strategy",
    "StrategyAdvisor",
    "StrategyDisplay",
    "TrainingHistoryDisplay",
    "TransferClassifier",
    "TransferGainDisplay",
    "__version__",
    "adapt_channels",
    "cache_info",
    "clear_cache",
    "crop_images",
    "distributed",
    "drop_bad",
    "exceptions",
    "export",
    "export_onnx",
    "export_openvino",
    "find_bad_images",
    "find_duplicates",
    "find_label_errors",
    "find_outliers",
    "list_backbones",
    "list_layers",
    "load_image_folder",
    "make_feature_pipeline",
    "recommend_strategy",
    "register_backbone",
    "release_memory",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    if name in {"distributed", "exceptions", "export"}:
        return import_module(f"skltl.{name}")
    if name in _SUBPACKAGES:
        return getattr(import_module(f"skltl.{_SUBPACKAGES[name]}"), name)
    raise AttributeError(f"module 'skltl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
