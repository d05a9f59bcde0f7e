"""
Start of a service, and its threads
===================================

Two tables:

- The time from the first statement to the first prediction of a saved pipeline, part by
  part, beside a program that does the same by hand: it imports torch, torchvision and
  scikit-learn, loads the weights, and runs the network and a linear model. Both run in
  new processes, alternately; the figures are medians.
- Images per second of one process in which 1, 2 and 4 threads predict single images
  with one pipeline.

    python bench_service.py --backbone resnet50
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import torchvision
from PIL import Image
from reporting import print_table, write_json
from safetensors.torch import save_file

from skltl import make_feature_pipeline

# Programs that print the times of their parts as JSON.
PIPELINE = """
import json, sys, time
start = time.perf_counter()
import joblib, torch, torchvision, sklearn.linear_model
imported = time.perf_counter()
import skltl.features
own = time.perf_counter()
pipeline = joblib.load("pipeline.joblib").set_params(feat__batch_size=1)
loaded = time.perf_counter()
pipeline.predict(["image.jpg"])
done = time.perf_counter()
parts = imported - start, own - imported, loaded - own, done - loaded, done - start
print(json.dumps(parts))
"""
BY_HAND = """
import json, sys, time
start = time.perf_counter()
import joblib, torch, torchvision, sklearn.linear_model
imported = time.perf_counter()
import numpy as np
from PIL import Image
from safetensors.torch import load_file
own = time.perf_counter()
with torch.device("meta"):
    network = torchvision.models.get_model(sys.argv[1])
network.load_state_dict(load_file("network.safetensors"), assign=True)
network.fc = torch.nn.Identity()
network.eval()
mean, scale, coef, intercept = np.load("linear.npz").values()
loaded = time.perf_counter()
image = Image.open("image.jpg").convert("RGB").resize((256, 256))
pixels = np.array(image.crop((16, 16, 240, 240)), dtype=np.float32) / 255
pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
batch = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
with torch.inference_mode():
    features = network(batch).numpy()
(((features - mean) / scale) @ coef.T + intercept).argmax(axis=1)
done = time.perf_counter()
parts = imported - start, own - imported, loaded - own, done - loaded, done - start
print(json.dumps(parts))
"""
PARTS = ["import torch, sklearn", "other imports", "load", "predict", "total"]


def create_files(backbone, folder):
    """Write an image, a fitted pipeline, and what the program by hand needs."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 224, 224, 3), dtype=np.uint8)
    Image.fromarray(images[0]).save(folder / "image.jpg")
    pipeline = make_feature_pipeline(
        backbone, "softmax", weights=None, random_state=0, engine="torch"
    )
    pipeline.set_params(feat__precision="float32")
    pipeline.fit(images, np.arange(20) % 3)
    joblib.dump(pipeline, folder / "pipeline.joblib")
    network = torchvision.models.get_model(backbone)
    save_file(network.state_dict(), folder / "network.safetensors")
    scaler, linear = pipeline[1:]
    values = scaler.mean_, scaler.scale_, linear.coef_, linear.intercept_
    np.savez(folder / "linear.npz", *values)
    return pipeline, images


def run(code, backbone, folder):
    """Run a program in a new process; return the times of its parts in seconds."""
    command = [sys.executable, "-c", code, backbone]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return json.loads(done.stdout)


def measure_start(backbone, folder, n_repeats):
    """Return the rows of the first table."""
    programs = {"skltl": PIPELINE, "by hand": BY_HAND}
    found = {name: [] for name in programs}
    for _ in range(n_repeats):
        for name, code in programs.items():
            found[name].append(run(code, backbone, folder))
    medians = {
        name: [statistics.median(part) for part in zip(*times, strict=True)]
        for name, times in found.items()
    }
    medians["ratio"] = np.divide(medians["skltl"], medians["by hand"]).tolist()
    return [
        {"seconds": name, **dict(zip(PARTS, medians[name], strict=True))}
        for name in medians
    ]


def measure_threads(pipeline, images, n_requests):
    """Return the rows of the second table."""
    pipeline.set_params(feat__batch_size=1)
    requests = [images[number % len(images)][None] for number in range(n_requests)]
    list(map(pipeline.predict, requests[:3]))
    rows = []
    for n_threads in (1, 2, 4):
        with ThreadPoolExecutor(n_threads) as threads:
            start = time.perf_counter()
            list(threads.map(pipeline.predict, requests))
            seconds = time.perf_counter() - start
        rows.append({"threads": n_threads, "images/s": n_requests / seconds})
    return rows


def main():
    """Measure both, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--backbone", default="resnet50", help="one with a layer `fc`")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline, images = create_files(args.backbone, folder)
        start = measure_start(args.backbone, folder, args.repeats)
        threads = measure_threads(pipeline, images, args.requests)
    print_table(start)
    print_table(threads)
    if args.json:
        write_json(args.json, {"start": start, "threads": threads})


if __name__ == "__main__":
    main()
