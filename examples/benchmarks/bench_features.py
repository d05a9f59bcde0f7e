"""
From JPEG files to features: images per second
==============================================

A hand-written ``DataLoader`` loop (float32, with 0 and 2 workers) against
``CNNFeatureTransformer`` with each engine, and the bound of the machine: the forward
pass alone on pictures in memory at its best batch size, and decoding with all cores,
which share the cores.

    python bench_features.py --data DIR --backbones squeezenet1_0 resnet18

``DIR`` has one folder of pictures for each class; weights are random. What is not
installed is left out. Rows are interleaved, and the best of several rounds counts.
"""

import argparse
import time

import torch
import torchvision
from bench_fine_tuning import PictureFiles
from bench_grid_search import read_folders
from reporting import print_table, write_json
from torch import nn
from torch.utils.data import DataLoader

from skltl import CNNFeatureTransformer
from skltl.backbones import can_run
from skltl.images import iter_batches, iter_crops, read_images

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def by_hand(backbone, paths, n_workers):
    """Return a function that does what people write."""
    model = torchvision.models.get_model(backbone).eval()
    layers = model.features if hasattr(model, "features") else None
    if layers is None:
        layers = nn.Sequential(*list(model.children())[:-2])

    @torch.no_grad()
    def run():
        loader = DataLoader(PictureFiles(paths, paths), 32, num_workers=n_workers)
        return torch.cat([layers(batch).mean(dim=(2, 3)) for batch, _ in loader])

    return run


def forward_only(fitted, batch_size):
    """Return a function that sends pictures in memory through the network alone."""
    fitted.set_params(batch_size=batch_size)
    recipe = fitted._recipe()
    size = recipe.preprocessing.crop_size
    pixels = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8)

    def run():
        for _ in range(max(1, 64 // batch_size)):
            recipe.compute(pixels)

    return run


def decode_only(fitted, paths, n_threads):
    """Return a function that decodes, resizes and crops, and does nothing else."""

    def run():
        source = read_images(paths)
        crops = iter_crops(
            source, range(len(paths)), fitted.preprocessing_, 8, n_threads
        )
        for _ in iter_batches(crops, 8):
            pass

    return run


def best_rates(jobs, counts, rounds):
    """Return pictures per second, the best of several rounds, interleaved."""
    best = dict.fromkeys(jobs, float("inf"))
    for run in jobs.values():
        run()  # loads, converts, compiles
    for _ in range(rounds):
        for name, run in jobs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: counts[name] / seconds for name, seconds in best.items()}


def measure(backbone, paths, engines, rounds):
    """Return the rows of the table for one network."""
    n_threads = torch.get_num_threads()
    jobs = {f"by hand, {n} workers": by_hand(backbone, paths, n) for n in (0, 2)}
    counts = dict.fromkeys(jobs, len(paths))
    limits = {}
    for engine in engines:
        fitted = CNNFeatureTransformer(backbone, weights=None, engine=engine).fit(paths)
        jobs[engine] = lambda fitted=fitted: fitted.transform(paths)
        counts[engine] = len(paths)
        for batch_size in BATCH_SIZES:
            name = f"{engine} forward {batch_size}"
            other = CNNFeatureTransformer(backbone, weights=None, engine=engine)
            limits[name] = forward_only(other.fit(paths), batch_size)
            counts[name] = max(1, 64 // batch_size) * batch_size
    limits["decode"] = decode_only(fitted, paths, n_threads)
    counts["decode"] = len(paths)
    rates = best_rates({**jobs, **limits}, counts, rounds)
    rows = []
    slowest = max(rates[f"by hand, {n} workers"] for n in (0, 2))
    for name in jobs:
        row = {"network": backbone, "way": name, "images/s": rates[name]}
        row["times by hand"] = rates[name] / slowest
        if name in engines:
            forward = max(rates[f"{name} forward {size}"] for size in BATCH_SIZES)
            bound = 1 / (1 / forward + 1 / rates["decode"])
            row |= {"forward": forward, "decode": rates["decode"], "bound": bound}
            row["of bound"] = rates[name] / bound
        else:
            row |= dict.fromkeys(("forward", "decode", "bound", "of bound"), "")
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="a folder of class folders")
    parser.add_argument("--backbones", nargs="+", default=["squeezenet1_0", "resnet18"])
    parser.add_argument("--engines", nargs="+", default=["torch", "openvino"])
    parser.add_argument("--pictures", type=int, default=102)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()

    paths, _ = read_folders(arguments.data)
    paths = paths[:: max(1, len(paths) // arguments.pictures)][: arguments.pictures]
    device = torch.device("cpu")
    engines = [one for one in arguments.engines if can_run(one, device)]
    rows = []
    for backbone in arguments.backbones:
        rows += measure(backbone, paths, engines, arguments.rounds)
        print_table(rows[-len(engines) - 2 :])
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
