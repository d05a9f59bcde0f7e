"""Train ``tiny``, the backbone included in skltl, on Tiny-ImageNet-200.

Tiny-ImageNet-200 has 200 classes of ImageNet, each with 500 training images and 50
validation images of 64 x 64 pixels. Given a folder with ``train`` and ``val``, run::

    python examples/train_tiny_backbone.py tiny-imagenet-200 tiny.safetensors

Training takes an hour or more on two processor cores, and 3 GB of memory. ``--seed``
controls all randomness; the number of threads changes the last digits.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import (
    affine_grid,
    cross_entropy,
    grid_sample,
    interpolate,
)

from skltl.networks._tiny import TinyNet

# Channel means and standard deviations of ImageNet, as in torchvision.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

BATCH_SIZE = 128
PEAK_LEARNING_RATE = 0.2
WEIGHT_DECAY = 2.5e-4
SMALLEST_ZOOM = 0.75
# Random zoom makes objects appear larger in training than in whole images; a larger
# test size compensates for it: "Fixing the train-test resolution discrepancy", Touvron,
# Vedaldi, Douze and Jegou, NeurIPS, 2019.
VAL_SIZE = 80


def read_images(paths):
    """Decode all images into one uint8 tensor (n, 3, 64, 64)."""

    def read(path):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, paths)))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read_data(folder):
    """Return images and class indices of the training and validation sets."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    train = [
        (path, number)
        for number, name in enumerate(classes)
        for path in sorted((folder / "train" / name / "images").iterdir())
    ]
    annotations = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    val = []
    for line in annotations:
        file_name, class_name, *_ = line.split("\t")
        val.append((folder / "val" / "images" / file_name, classes.index(class_name)))
    return [
        (read_images([path for path, _ in part]), torch.tensor([y for _, y in part]))
        for part in (train, val)
    ]


def normalized(images):
    """Convert uint8 images to the input of the network."""
    batch = (images.float() / 255 - MEAN) / STD
    return batch.contiguous(memory_format=torch.channels_last)


def augmented(batch, generator):
    """Apply a random zoom and a random horizontal flip to each image."""
    n = len(batch)
    zoom = torch.empty(n).uniform_(SMALLEST_ZOOM, 1, generator=generator)
    shift = torch.empty(n, 2).uniform_(-1, 1, generator=generator) * (1 - zoom)[:, None]
    mirror = torch.randint(2, (n,), generator=generator) * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = zoom * mirror
    affine[:, 1, 1] = zoom
    affine[:, :, 2] = shift
    grid = affine_grid(affine, batch.shape, align_corners=False)
    return grid_sample(batch, grid, padding_mode="reflection", align_corners=False)


def parameter_groups(network):
    """Apply weight decay to the weights of convolutions and the linear layer only."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


def train(network, images, targets, n_epochs, generator, report):
    """Train with Nesterov momentum and a one-cycle learning rate, in bfloat16."""
    n_steps = len(images) // BATCH_SIZE
    optimizer = torch.optim.SGD(
        parameter_groups(network), lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=n_epochs * n_steps, pct_start=0.2
    )
    for epoch in range(n_epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator)
        losses = []
        for step in range(n_steps):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            batch = augmented(normalized(images[chosen]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = cross_entropy(logits.float(), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        report(epoch, float(np.mean(losses)))


@torch.inference_mode()
def accuracy(network, images, targets):
    """Return the top-1 accuracy on images enlarged to the test size."""
    network.eval()
    n_right = 0
    for first in range(0, len(images), 250):
        part = slice(first, first + 250)
        batch = interpolate(normalized(images[part]), VAL_SIZE, mode="bilinear")
        predicted = network(batch).argmax(1)
        n_right += int((predicted == targets[part]).sum())
    return n_right / len(images)


def main():
    """Train, evaluate and save the network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that contains train and val")
    parser.add_argument("out", type=Path, help="output file (.safetensors)")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    started = time.monotonic()
    (images, targets), (val_images, val_targets) = read_data(arguments.data)
    torch.manual_seed(arguments.seed)
    network = TinyNet().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(arguments.seed)

    def report(epoch, loss):
        top_1 = accuracy(network, val_images[:2000], val_targets[:2000])
        minutes = (time.monotonic() - started) / 60
        print(
            f"epoch {epoch + 1:2d}  loss {loss:.3f}  top-1 {top_1:.3f} (of 2,000)  "
            f"{minutes:.1f} min",
            flush=True,
        )

    train(network, images, targets, arguments.epochs, generator, report)

    halved = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(halved)
    top_1 = accuracy(network, val_images, val_targets)
    print(f"top-1 on val, from float16 weights: {top_1:.4f}")
    metadata = {
        "data": "Tiny-ImageNet-200, train",
        "epochs": str(arguments.epochs),
        "seed": str(arguments.seed),
        "top_1_val": f"{top_1:.4f}",
    }
    save_file(halved, arguments.out, metadata=metadata)


if __name__ == "__main__":
    main()
