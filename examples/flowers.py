"""
Image classification from a folder of class folders
===================================================

Compare three linear classifiers on the features of a frozen network with the fine-tuned
network. The script prints the recommended strategy and a table of accuracies and times,
and saves figures.

    python flowers.py --data DIR --backbone vgg16
    python flowers.py --data DIR --backbone squeezenet1_0 --weights FILE --figures OUT
    python flowers.py --data DIR --backbone squeezenet1_0 --weights FILE --gain

``DIR`` contains one folder of images per class, for example the 17 or 102 flower
categories of the University of Oxford. A third of the images of each class is used for
testing. The features are computed by the advisor and cached for the linear classifiers.
"""

import argparse
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.model_selection import train_test_split

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    PredictionGridDisplay,
    StrategyAdvisor,
    StrategyDisplay,
    TrainingHistoryDisplay,
    TransferGainDisplay,
    find_bad_images,
    make_feature_pipeline,
)

mpl.use("Agg")  # figures go to files


def read_folders(folder):
    """Return the paths and labels of a folder of class folders, without bad images."""
    paths = sorted(str(path) for path in Path(folder).glob("*/*") if path.is_file())
    if not paths:
        raise SystemExit(f"{folder} contains no folders of images.")
    bad = find_bad_images(paths)
    for image in bad:
        print(f"skipped: {image.path} ({image.reason})")
    left_out = {image.index for image in bad}
    paths = [path for index, path in enumerate(paths) if index not in left_out]
    return np.array(paths), np.array([Path(path).parent.name for path in paths])


def timed_row(name, classifier, train, test):
    """Fit and score a classifier; return a row of the table."""
    start = time.perf_counter()
    classifier.fit(*train)
    seconds = time.perf_counter() - start
    row = (name, classifier.score(*test), seconds)
    print(f"{name:<28} {row[1]:.3f} {seconds:8.1f} s", flush=True)
    return row


def save_figures(folder, advisor, linear, tuned, X_test, y_test):
    """Save all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    first = np.unique(y_test, return_index=True)[1][:12]
    figures = {
        "strategy": StrategyDisplay.from_advisor(advisor),
        "history": TrainingHistoryDisplay.from_estimator(tuned),
        "worst_linear": PredictionGridDisplay.from_estimator(linear, X_test, y_test),
        "worst_tuned": PredictionGridDisplay.from_estimator(tuned, X_test, y_test),
        "where_linear": GradCAMDisplay.from_estimator(linear, X_test[first]),
        "where_tuned": GradCAMDisplay.from_estimator(tuned, X_test[first]),
    }
    for name, display in figures.items():
        path = folder / f"{name}.png"
        display.figure_.savefig(path, dpi=120)
        print(f"figure: {path}")


def compare_with_scratch(arguments, train):
    """Train all layers, from pretrained and from random weights."""
    settings = {
        "unfreeze": "all",
        "head_init": "random",
        "head_epochs": 0,
        "finetune_epochs": 25,
        "schedule": "cosine",
        "validation_fraction": 0.25,
        "image_size": 128,
        "random_state": arguments.seed,
    }
    both = [
        FineTunedCNNClassifier(arguments.backbone, weights=weights, **settings)
        for weights in (arguments.weights, None)
    ]
    for name, classifier in zip(("transfer", "scratch"), both, strict=True):
        start = time.perf_counter()
        history = classifier.fit(*train).history_
        seconds = time.perf_counter() - start
        first, last = (history[epoch]["validation_score"] for epoch in (0, -1))
        print(f"{name}: {first:.3f} to {last:.3f} in {seconds:.0f} s")
    display = TransferGainDisplay.from_estimators(*both)
    print({name: round(gain, 3) for name, gain in display.gains_.items()})
    arguments.figures.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(arguments.figures / "gain.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--backbone", default="vgg16")
    parser.add_argument("--weights", default="pretrained", help="file, or name")
    parser.add_argument("--figures", default="flowers_figures", type=Path)
    parser.add_argument("--cache", help="folder for cached features (default: none)")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument(
        "--gain", action="store_true", help="compare with training from scratch"
    )
    arguments = parser.parse_args()

    paths, labels = read_folders(arguments.data)
    X_train, X_test, y_train, y_test = train_test_split(
        paths, labels, test_size=1 / 3, stratify=labels, random_state=arguments.seed
    )
    train, test = (X_train, y_train), (X_test, y_test)
    if arguments.gain:
        compare_with_scratch(arguments, train)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, train, test, cache=arguments.cache or folder)


def compare(arguments, train, test, cache):
    """Recommend a strategy, compare the classifiers, and save figures."""
    network = {"weights": arguments.weights}
    features = {**network, "cache": cache}
    start = time.perf_counter()
    transformer = CNNFeatureTransformer(arguments.backbone, **features)
    advisor = StrategyAdvisor(transformer, random_state=arguments.seed).fit(*train)
    seconds = time.perf_counter() - start
    print(f"{advisor.report()}\n(measured in {seconds:.1f} s)\n")

    linear = {
        name: make_feature_pipeline(arguments.backbone, name, **features)
        for name in ("svm", "softmax", "ovr")
    }
    tuned = FineTunedCNNClassifier(
        arguments.backbone, unfreeze=1, random_state=arguments.seed, **network
    )
    print(f"{len(train[1])} images for training, {len(test[1])} for testing")
    for name, classifier in linear.items():
        timed_row(f"frozen features, {name}", classifier, train, test)
    timed_row("fine-tuned, last block", tuned, train, test)
    save_figures(arguments.figures, advisor, linear["softmax"], tuned, *test)


if __name__ == "__main__":
    main()
