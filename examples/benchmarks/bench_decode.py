"""
Exact and fast decoding of large JPEG files
===========================================

Throughput for JPEG files of 12 megapixels, decoded in full and at a reduced scale, and
the distance between the resulting features.

    python bench_decode.py --backbone tiny
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from reporting import print_table, write_json
from sklearn.datasets import load_sample_images

from skltl import CNNFeatureTransformer

SIZE = (4000, 3000)


def write_photographs(folder, n):
    """Write enlarged crops of the sample photographs of scikit-learn, with noise."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    paths = []
    for number in range(n):
        photograph = photographs[number % len(photographs)]
        y, x = rng.integers(0, 100, size=2)
        image = Image.fromarray(photograph[y : y + 300, x : x + 400]).resize(SIZE)
        noise = rng.integers(-6, 7, size=(SIZE[1], SIZE[0], 1), dtype=np.int16)
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        paths.append(str(Path(folder) / f"{number}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=92)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(folder, arguments.images)
        fitted = {
            decode: CNNFeatureTransformer(
                arguments.backbone, weights=arguments.weights, decode=decode
            ).fit(paths)
            for decode in ("exact", "fast")
        }
        best, features = dict.fromkeys(fitted, float("inf")), {}
        for _ in range(arguments.rounds):
            for decode, transformer in fitted.items():
                start = time.perf_counter()
                features[decode] = transformer.transform(paths)
                best[decode] = min(best[decode], time.perf_counter() - start)
    distance = np.linalg.norm(features["fast"] - features["exact"], axis=1)
    relative = distance / np.linalg.norm(features["exact"], axis=1)
    rows = [
        {
            "decode": decode,
            "images/s": len(paths) / seconds,
            "times exact": best["exact"] / seconds,
            "distance, median": float(np.median(relative)) if decode == "fast" else 0.0,
            "distance, largest": float(relative.max()) if decode == "fast" else 0.0,
        }
        for decode, seconds in best.items()
    ]
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
