"""
Throughput of feature extraction on a GPU
=========================================

Images per second of ``CNNFeatureTransformer`` from 8-bit images in memory, compared
with the forward pass alone on a batch in GPU memory, for several batch sizes.

    python bench_gpu.py --backbone resnet50
"""

import argparse
import time

import numpy as np
import torch
from reporting import print_table, write_json

from skltl import CNNFeatureTransformer
from skltl.features import transformer_config
from skltl.inference import ENGINES

BATCH_SIZES = (32, 64, 128, 256, 512)


def forward_rate(fitted, batch_size, device, seconds):
    """Return the throughput of the forward pass in images per second."""
    config = transformer_config(fitted.set_params(batch_size=batch_size))
    shape = (batch_size, *config.preprocessing.size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)
    for _ in range(3):
        config.compute(pixels)
    wait_for(device)
    n_batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            config.compute(pixels)
        wait_for(device)
        n_batches += 10
    return n_batches * batch_size / (time.perf_counter() - start)


def end_to_end_rate(fitted, images, rounds):
    """Return the throughput from arrays to features, the best of several rounds."""
    fitted.transform(images[: 2 * fitted.batch_size])
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        fitted.transform(images)
        best = max(best, len(images) / (time.perf_counter() - start))
    return best


def measure(engine, images, arguments):
    """Return the rows of the table for one engine."""
    rows = []
    for batch_size in arguments.batch_sizes:
        fitted = CNNFeatureTransformer(
            arguments.backbone,
            weights=None,
            device=arguments.device,
            precision=arguments.precision,
            engine=engine,
            batch_size=batch_size,
        ).fit(images)
        row = {"engine": engine, "batch": batch_size}
        row["forward"] = forward_rate(
            fitted, batch_size, arguments.device, arguments.seconds
        )
        row["images/s"] = end_to_end_rate(fitted, images, arguments.rounds)
        rows.append(row)
    limit = max(row["forward"] for row in rows)
    return [{**row, "of limit": row["images/s"] / limit} for row in rows]


def wait_for(device):
    """Wait until a GPU has finished all kernels."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bfloat16")
    engines = {"nargs": "+", "choices": ENGINES, "default": ["torch", "compile"]}
    parser.add_argument("--engines", **engines)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument(
        "--side", type=int, default=256, help="height and width of the images"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU.")

    shape = (arguments.images, arguments.side, arguments.side, 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    rows = []
    for engine in arguments.engines:
        rows += measure(engine, images, arguments)
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
