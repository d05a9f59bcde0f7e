"""
Throughput of feature extraction from JPEG files
================================================

Images per second of ``CNNFeatureTransformer`` with each engine, and in float32,
compared with a manual ``DataLoader`` loop and other packages, which compute in float32.
The upper bound is the throughput at which the forward pass alone, on images in memory
at its best batch size, and decoding on all cores would share the cores. All values are
noisy estimates: the fraction of the bound may exceed 1.

    pip install "skltl[bench,openvino]"
    python bench_features.py --data DIR --backbones squeezenet1_0 resnet18

``DIR`` contains one folder of images per class; weights are random. Packages that are
not installed are skipped. Methods are interleaved, and the best of several rounds is
reported.
"""

import argparse
import time

import torch
from bench_grid_search import read_folders
from peers import peers
from reporting import print_table, write_json

from skltl import CNNFeatureTransformer
from skltl.features import transformer_config
from skltl.images import iter_batches, iter_crops, read_images
from skltl.inference import ENGINES, can_run

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def forward_only(fitted, batch_size):
    """Return a function that runs the network on images in memory."""
    fitted.set_params(batch_size=batch_size)
    config = transformer_config(fitted)
    shape = (batch_size, *config.preprocessing.size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8)

    def run():
        for _ in range(max(1, 64 // batch_size)):
            config.compute(pixels)

    return run


def decode_only(fitted, paths, n_threads):
    """Return a function that only decodes, resizes and crops."""

    def run():
        preprocessing, everything = fitted.preprocessing_, range(len(paths))
        crops = iter_crops(
            read_images(paths), everything, preprocessing, 8, n_threads, alternate=True
        )
        for _ in iter_batches(crops, 8):
            pass

    return run


def best_rates(jobs, counts, rounds):
    """Return images per second, the best of several rounds, interleaved."""
    best = dict.fromkeys(jobs, float("inf"))
    for run in jobs.values():
        run()  # load, convert, compile
    for _ in range(rounds):
        for name, run in jobs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: counts[name] / seconds for name, seconds in best.items()}


def measure(backbone, paths, engines, rounds):
    """Return the rows of the table for one network."""
    jobs = peers(backbone, paths)
    exact = CNNFeatureTransformer(
        backbone, weights=None, engine="torch", precision="float32"
    ).fit(paths)
    jobs["torch, float32"] = lambda: exact.transform(paths)
    limits, first, fitted = {}, {}, None
    counts = dict.fromkeys(jobs, len(paths))
    for engine in engines:
        fitted = CNNFeatureTransformer(backbone, weights=None, engine=engine).fit(paths)
        jobs[engine] = lambda fitted=fitted: fitted.transform(paths)
        counts[engine] = len(paths)
        start = time.perf_counter()
        fitted.transform(paths[:1])
        first[engine] = time.perf_counter() - start
        for batch_size in BATCH_SIZES:
            name = f"{engine} forward {batch_size}"
            other = CNNFeatureTransformer(backbone, weights=None, engine=engine)
            limits[name] = forward_only(other.fit(paths), batch_size)
            counts[name] = max(1, 64 // batch_size) * batch_size
    limits["decode"] = decode_only(fitted, paths, torch.get_num_threads())
    counts["decode"] = len(paths)
    rates = best_rates({**jobs, **limits}, counts, rounds)
    by_hand = max(rates[name] for name in jobs if name.startswith("manual loop"))
    rows = []
    for name in jobs:
        row = {"network": backbone, "way": name, "images/s": rates[name]}
        row["speedup"] = rates[name] / by_hand
        row |= dict.fromkeys(("forward", "batch", "decode", "of bound", "first, s"), "")
        if name in engines:
            row |= share_of_bound(name, rates)
            row["first, s"] = first[name]
        rows.append(row)
    return rows


def share_of_bound(engine, rates):
    """Compare a throughput with the upper bound of forward pass and decoding."""
    best = max(BATCH_SIZES, key=lambda size: rates[f"{engine} forward {size}"])
    forward, decode = rates[f"{engine} forward {best}"], rates["decode"]
    bound = 1 / (1 / forward + 1 / decode)
    return {
        "forward": forward,
        "batch": best,
        "decode": decode,
        "of bound": rates[engine] / bound,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--backbones", nargs="+", default=["squeezenet1_0", "resnet18"])
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["torch", "openvino"]
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()

    paths, _ = read_folders(arguments.data)
    paths = paths[:: max(1, len(paths) // arguments.images)][: arguments.images]
    device = torch.device("cpu")
    engines = [engine for engine in arguments.engines if can_run(engine, device)]
    rows = []
    for backbone in arguments.backbones:
        new = measure(backbone, paths, engines, arguments.rounds)
        print_table(new)
        rows += new
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
