"""
Accuracies in README and user guide
===================================

Accuracies on flowers, digits and ImageNet images with the ImageNet weights of
SqueezeNet 1.0, in float32, by the layer at which the network is truncated::

    python examples/benchmarks/figures.py --data DIR
    python examples/benchmarks/figures.py --data DIR --fine-tuning

``DIR`` is the folder that ``SKLTL_TEST_DATA`` names for the tests. ``--fine-tuning``
adds the tables of the page on fine-tuning, which takes half an hour.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from reporting import print_table
from sklearn.datasets import load_digits
from sklearn.model_selection import (
    StratifiedKFold,
    StratifiedShuffleSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    TransferClassifier,
    find_label_errors,
    find_outliers,
    list_layers,
    make_feature_pipeline,
)

BACKBONE = "squeezenet1_0"
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
DIGIT_SPLITS = StratifiedShuffleSplit(
    10, train_size=100, test_size=1000, random_state=0
)
FLOWER_SPLITS = StratifiedShuffleSplit(3, test_size=1 / 3, random_state=0)
LAYERS = [layer.name for layer in list_layers(BACKBONE)]


def linear_svm():
    """Return the scaler and classifier of `make_feature_pipeline`."""
    return make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))


def accuracies_by_layer(settings, X, y, splits, **more):
    """Return the mean accuracy of a linear SVM at each layer, from one forward pass."""
    transformer = CNNFeatureTransformer(BACKBONE, layer=LAYERS, **settings, **more)
    features = transformer.fit_transform(X)
    widths = [layer.channels for layer in list_layers(BACKBONE)]
    parts = np.split(features, np.cumsum(widths)[:-1], axis=1)
    return [cross_val_score(linear_svm(), part, y, cv=splits).mean() for part in parts]


def print_by_layer(settings, flowers, digits):
    """Print the table in README and on the page on features."""
    on_flowers = accuracies_by_layer(settings, *flowers, FOLDS)
    on_digits = accuracies_by_layer(settings, *digits, DIGIT_SPLITS, image_shape=(8, 8))
    rows = [
        {"layer": layer, "flowers": f"{scores[0]:.3f}", "digits": f"{scores[1]:.3f}"}
        for layer, *scores in zip(LAYERS, on_flowers, on_digits, strict=True)
    ]
    pixels = cross_val_score(linear_svm(), *digits, cv=DIGIT_SPLITS).mean()
    print_table([*rows, {"layer": "pixels", "flowers": "", "digits": f"{pixels:.3f}"}])


def print_classifiers(settings, flowers):
    """Print the accuracies of the three classifiers on the last layer."""
    for name in ("svm", "softmax", "ovr"):
        pipeline = make_feature_pipeline(
            BACKBONE, name, cache=True, random_state=0, **settings
        )
        score = cross_val_score(pipeline, *flowers, cv=FOLDS).mean()
        print(f"flowers, {name}: {score:.3f}")


def print_imagenet(settings, folder):
    """Print the top-1 and top-5 counts on the ImageNet images."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    classifier = PretrainedCNNClassifier(BACKBONE, **settings)
    paths = [folder / row["file"] for row in rows]
    best = classifier.fit(paths).predict_top_k(paths, k=5)
    names = classifier.categories_[[int(row["class_index"]) for row in rows]]
    n_first = int((best[:, 0] == names).sum())
    n_of_five = int((best == names[:, None]).any(axis=1).sum())
    print(f"ImageNet: {n_first} and {n_of_five} of {len(paths)}")


def print_advice(settings, X, y):
    """Print the strategy for 100 digits, and the accuracies on 1,000 others."""
    for size in (96, 224):
        more = {**settings, "image_shape": (8, 8), "image_size": size}
        splits = StratifiedShuffleSplit(
            3, train_size=100, test_size=1000, random_state=0
        )
        for train, test in splits.split(X, y):
            transformer = CNNFeatureTransformer(BACKBONE, **more)
            advised = TransferClassifier(transformer, random_state=0)
            last = make_feature_pipeline(BACKBONE, random_state=0, **more)
            accuracies = [
                classifier.fit(X[train], y[train]).score(X[test], y[test])
                for classifier in (advised, last)
            ]
            lead, error = advised.advisor_.lead_
            print(
                f"100 digits of {size} pixels: {advised.strategy_.name}, lead "
                f"{lead:.3f} ({error:.3f}); advised {accuracies[0]:.3f}, last layer "
                f"{accuracies[1]:.3f}",
                flush=True,
            )


def print_fine_tuning(settings, flowers):
    """Print accuracies of frozen features and of fine-tuned networks on flowers."""
    options = (
        {"unfreeze": 1, "backbone_lr": 0.003},
        *({"unfreeze": "all", "backbone_lr": rate} for rate in (0.001, 0.003, 0.01)),
    )
    frozen = make_feature_pipeline(BACKBONE, "svm", random_state=0, **settings)
    classifiers = {"frozen, svm": frozen}
    for option in options:
        classifiers[str(option)] = FineTunedCNNClassifier(
            BACKBONE, random_state=0, **option, **settings
        )
    for name, classifier in classifiers.items():
        scores = cross_val_score(classifier, *flowers, cv=FLOWER_SPLITS)
        print(f"{name}: {scores.mean():.3f} (by split: {scores.round(3)})", flush=True)


def print_other_targets(settings, paths, names):
    """Print scores of labels and of the mean hue: linear models, and fine-tuned."""
    classes = np.unique(names, return_inverse=True)[1]
    hues = [np.asarray(Image.open(path).convert("HSV"))[..., 0] for path in paths]
    members = np.random.default_rng(0).random((17, 5)) < 0.5
    targets = {
        "sets of classes, subset accuracy": members[classes].astype(int),
        "bits of the class, subset accuracy": (classes[:, None] >> np.arange(5)) & 1,
        "mean hue, R²": np.array([hue.mean() for hue in hues]) / 255,
    }
    folds = list(FOLDS.split(paths, names))
    for name, y in targets.items():
        kind = {"classifier": "ovr"} if y.ndim > 1 else {"regressor": "ridge"}
        estimator = FineTunedCNNClassifier if y.ndim > 1 else FineTunedCNNRegressor
        models = (
            make_feature_pipeline(BACKBONE, **kind, **settings),
            estimator(BACKBONE, unfreeze=2, random_state=0, **settings),
        )
        frozen, tuned = (cross_val_score(one, paths, y, cv=folds) for one in models)
        difference = tuned - frozen
        error = difference.std(ddof=1) / len(folds) ** 0.5
        print(
            f"flowers, {name}: linear {frozen.mean():.3f}, fine-tuned "
            f"{tuned.mean():.3f}, difference {difference.mean():.3f} +- {error:.3f}",
            flush=True,
        )


def print_curation(settings, paths, names):
    """Print how many of planted wrong labels and digits are found among the flowers."""
    classes, targets = np.unique(names, return_inverse=True)
    transformer = CNNFeatureTransformer(BACKBONE, cache=True, **settings)
    rates = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        wrong, labels = rng.permutation(len(paths))[: len(paths) // 20], targets.copy()
        for index in wrong:
            others = np.delete(np.arange(len(classes)), targets[index])
            labels[index] = rng.choice(others)
        found = find_label_errors(paths, labels, transformer)
        rates.append(np.isin(found.order[: len(wrong)], wrong).mean())
    print(f"wrong labels: of the first 5 %, {np.mean(rates):.2f} (least {min(rates)})")
    digits = (load_digits().images[:20] * 15).astype(np.uint8)
    found = find_outliers([*paths, *digits], transformer)
    n_found = int((found.order[:20] >= len(paths)).sum())
    print(f"outliers: {n_found} of 20 digits are among the first 20")


def print_fine_tuning_on_digits(settings, X, y):
    """Print accuracies on digits: frozen at each layer, and fine-tuned from two."""
    settings = {**settings, "image_shape": (8, 8), "image_size": 96}
    splits = StratifiedShuffleSplit(3, train_size=1000, random_state=0)
    transformer = CNNFeatureTransformer(BACKBONE, layer=LAYERS, **settings)
    features = transformer.fit_transform(X)
    widths = [layer.channels for layer in list_layers(BACKBONE)]
    parts = np.split(features, np.cumsum(widths)[:-1], axis=1)
    for name, part in zip(LAYERS, parts, strict=True):
        scores = cross_val_score(linear_svm(), part, y, cv=splits)
        print(f"digits, frozen at {name}: {scores.mean():.4f} {scores.round(4)}")
    for options in (
        {"layer": "last"},
        {"layer": "fire8"},
        {"layer": "fire8", "backbone_lr": 0.001},
    ):
        tuned = FineTunedCNNClassifier(BACKBONE, random_state=0, **options, **settings)
        scores = cross_val_score(tuned, X, y, cv=splits)
        print(f"digits, {options}: {scores.mean():.4f} {scores.round(4)}", flush=True)


def main():
    """Print the requested tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fine-tuning", action="store_true")
    options = parser.parse_args()
    weights = options.data / "weights" / "squeezenet1_0_imagenet.safetensors"
    settings = {"weights": weights, "precision": "float32"}
    paths = sorted((options.data / "flowers17").glob("*/*.jpg"))
    flowers = np.array(paths, dtype=object), [path.parent.name for path in paths]
    rows, labels = load_digits(return_X_y=True)
    print_by_layer(settings, flowers, (rows / 16, labels))
    print_classifiers(settings, flowers)
    print_imagenet(settings, options.data / "imagenet_samples")
    print_advice(settings, rows / 16, labels)
    print_curation(settings, *flowers)
    if options.fine_tuning:
        print_fine_tuning(settings, flowers)
        print_fine_tuning_on_digits(settings, rows / 16, labels)
        print_other_targets(settings, *flowers)


if __name__ == "__main__":
    main()
