"""
Fine-tuning compared with a manual training loop
================================================

The same images and the same numbers of epochs (25 for the head, 10 with the last block
unfrozen) for

- a manual loop as in common tutorials: a ``DataLoader``, the whole network in every
  epoch, SGD with momentum, a tenth of the head's learning rate for the block, float32;
- ``FineTunedCNNClassifier``.

    python bench_fine_tuning.py --data DIR --backbone resnet18
    python bench_fine_tuning.py --data DIR --backbone squeezenet1_0 --weights FILE

``DIR`` contains one folder of images per class. Random weights are sufficient to
measure times; with pretrained weights, the accuracies on held-out images can be
compared.
"""

import argparse
import time

import numpy as np
import torch
import torchvision
from bench_grid_search import read_folders
from PIL import Image
from reporting import print_table, write_json
from safetensors.torch import load_file
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from skltl import CNNFeatureTransformer, FineTunedCNNClassifier

EPOCHS = (25, 10)
HEAD_RATE, BLOCK_RATE = 0.01, 0.001


class ImageFiles(Dataset):
    """Decode, resize, crop and normalize one image at a time, as in tutorials."""

    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def __init__(self, paths, targets):
        self.paths, self.targets = paths, targets

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transform(image), self.targets[index]


class ByHand:
    """The training loop of common tutorials.

    Parameters
    ----------
    backbone : {"vgg16", "resnet18", "squeezenet1_0"}
        The network, of which the layers before the classifier are used.
    weights : path or None
        Path of a safetensors file; ``None`` for random weights.
    n_workers : int
        Number of decoding processes.
    """

    def __init__(self, backbone, weights, n_workers):
        model = torchvision.models.get_model(backbone)
        if weights is not None:
            model.load_state_dict(load_file(weights))
        if backbone == "resnet18":
            layers = nn.Sequential(*list(model.children())[:-2])
            self.last_block, n_features = model.layer4, 512
        elif backbone == "vgg16":
            layers = model.features
            self.last_block, n_features = model.features[24:], 512
        else:
            layers = model.features
            self.last_block, n_features = model.features[12], 512
        self.layers, self.n_features, self.n_workers = layers, n_features, n_workers

    def fit(self, paths, labels):
        """Train the head, then the last block together with the head."""
        self.classes_, targets = np.unique(labels, return_inverse=True)
        head = nn.Linear(self.n_features, len(self.classes_))
        self.model = nn.Sequential(
            self.layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
        )
        self.layers.requires_grad_(False)
        groups = [{"params": head.parameters(), "lr": HEAD_RATE}]
        self.seconds = [self._train(paths, targets, groups, EPOCHS[0])]
        self.last_block.requires_grad_(True)
        groups.append({"params": self.last_block.parameters(), "lr": BLOCK_RATE})
        self.seconds.append(self._train(paths, targets, groups, EPOCHS[1]))
        return self

    def _train(self, paths, targets, groups, n_epochs):
        """Train for some epochs; return the duration of each in seconds."""
        optimizer = torch.optim.SGD(groups, lr=HEAD_RATE, momentum=0.9)
        loader = DataLoader(
            ImageFiles(paths, targets), 32, shuffle=True, num_workers=self.n_workers
        )
        seconds = []
        for _ in range(n_epochs):
            start = time.perf_counter()
            self.model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(images), labels)
                loss.backward()
                optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    @torch.no_grad()
    def score(self, paths, labels):
        """Return the accuracy."""
        self.model.eval()
        targets = np.searchsorted(self.classes_, labels)
        loader = DataLoader(ImageFiles(paths, targets), 32)
        right = [(self.model(x).argmax(1) == y).sum().item() for x, y in loader]
        return sum(right) / len(paths)


def compare(arguments, paths, labels, seed):
    """Fit both methods on one split; return a row of the table for each."""
    n_classes = len(np.unique(labels))
    sizes = [n * n_classes for n in (arguments.per_class, 8)]
    split = StratifiedShuffleSplit(
        1, train_size=sizes[0], test_size=sizes[1], random_state=seed
    )
    train, test = next(split.split(paths, labels))
    paths = np.array(paths)
    learned, held_out = list(paths[train]), list(paths[test])
    settings = {"weights": arguments.weights, "random_state": seed}
    one_pass = CNNFeatureTransformer(arguments.backbone, **settings).fit(learned)
    one_pass.transform(learned[:1])

    start = time.perf_counter()
    one_pass.transform(learned)
    pass_seconds = time.perf_counter() - start
    torch.manual_seed(seed)
    by_hand = ByHand(arguments.backbone, arguments.weights, arguments.workers)
    rows = []
    ours = FineTunedCNNClassifier(arguments.backbone, unfreeze=1, **settings)
    for name, classifier in {"skltl": ours, "manual loop": by_hand}.items():
        start = time.perf_counter()
        classifier.fit(learned, labels[train])
        seconds = time.perf_counter() - start
        epochs = epoch_seconds(classifier)
        rows.append(
            {
                "way": name,
                "seconds": seconds,
                "epoch, head": float(np.median(epochs[0])),
                "epoch, tuning": float(np.median(epochs[1])),
                "one pass": pass_seconds,
                "accuracy": classifier.score(held_out, labels[test]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def epoch_seconds(classifier):
    """Return the durations of the epochs of both stages in seconds."""
    if isinstance(classifier, ByHand):
        return classifier.seconds
    return [
        [epoch["seconds"] for epoch in classifier.history_ if epoch["stage"] == stage]
        for stage in ("head", "fine-tuning")
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", help="safetensors file (default: random)")
    parser.add_argument("--per-class", type=int, default=16, help="training images")
    parser.add_argument("--seeds", type=int, default=1, help="number of splits")
    parser.add_argument("--workers", type=int, default=2, help="of the manual loop")
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()

    paths, labels = read_folders(arguments.data)
    pairs = [compare(arguments, paths, labels, seed) for seed in range(arguments.seeds)]
    print_table([row for pair in pairs for row in pair])
    ours, by_hand = zip(*pairs, strict=True)
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    figures = {
        "speedup, median": float(np.median(ratios)),
        "accuracy, skltl": float(np.mean([row["accuracy"] for row in ours])),
        "accuracy, manual loop": float(np.mean([row["accuracy"] for row in by_hand])),
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    if arguments.json:
        write_json(arguments.json, {"rows": pairs, **figures})


if __name__ == "__main__":
    main()
