"""
Exports of pipelines: agreement with the pipeline, and throughput
=================================================================

For each network, a pipeline of features and logistic regression is exported as a torch
module, to ONNX and to OpenVINO. The table has the largest difference between the scores
of the export and those of the pipeline, in units of the largest score; whether all
labels are equal; and the throughput of each, from image files to predictions, for all
images at once and for a single one. The images are photographs of flowers, if
SKLTL_TEST_DATA is set, or random ones.

    SKLTL_TEST_DATA=... python bench_export.py --images 50

Needs ``skltl[onnx,openvino]``.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from PIL import Image
from reporting import print_table, write_json

from skltl import (
    crop_images,
    export_onnx,
    export_openvino,
    make_feature_pipeline,
    to_torch,
)

NETWORKS = [
    "vgg16",
    "resnet18",
    "resnet50",
    "squeezenet1_0",
    "mobilenet_v3_large",
    "densenet121",
    "convnext_tiny",
    "efficientnet_b0",
    "vit_b_16",
]


def find_images(n_images, folder):
    """Return paths of images, and labels of several classes."""
    data = os.environ.get("SKLTL_TEST_DATA")
    if data:
        paths = sorted((Path(data) / "flowers17").glob("*/*.jpg"))
        paths = paths[:: max(1, len(paths) // n_images)][:n_images]
        return paths, [path.parent.name for path in paths]
    rng = np.random.default_rng(0)
    paths = [Path(folder) / f"{number}.jpg" for number in range(n_images)]
    for path in paths:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375)).save(path)
    return paths, [str(number % 5) for number in range(n_images)]


def weights_of(name):
    """Return the file of a network's weights, or ``None`` for random ones."""
    data = os.environ.get("SKLTL_TEST_DATA", "")
    path = Path(data) / "weights" / f"{name}_imagenet.safetensors"
    return path if data and path.is_file() else None


def onnx_runner(path):
    """Return a function that runs a file of ONNX."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(crops):
        return dict(zip(names, session.run(names, {"images": crops}), strict=True))

    return run


def openvino_runner(path):
    """Return a function that runs a model of OpenVINO in float32."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(crops):
        outputs = compiled([crops])
        return {output.any_name: outputs[output] for output in compiled.outputs}

    return run


def torch_runner(module):
    """Return a function that runs a torch module."""

    def run(crops):
        with torch.inference_mode():
            outputs = module(torch.from_numpy(crops))
        return {name: output.numpy() for name, output in outputs.items()}

    return run


def exports_of(fitted, folder):
    """Return functions that run the exports of a fitted pipeline, by name."""
    file, model = Path(folder) / "model.onnx", Path(folder) / "model.xml"
    module = to_torch(fitted)
    export_onnx(fitted, file)
    export_openvino(fitted, model)
    return {
        "torch module": torch_runner(module),
        "ONNX": onnx_runner(file),
        "OpenVINO": openvino_runner(model),
    }


def seconds_of(function, n_repeats):
    """Return the time that a function takes, the least of several runs."""
    seconds = []
    for _ in range(n_repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(name, paths, labels, folder, n_repeats):
    """Return a row of the table for the pipeline and for each of its exports."""
    weights = weights_of(name)
    fitted = make_feature_pipeline(
        name, "softmax", weights=weights, engine="torch", random_state=0
    )
    fitted.set_params(feat__precision="float32").fit(paths, labels)
    scores, predicted = fitted.decision_function(paths), fitted.predict(paths)
    n_threads = torch.get_num_threads()
    rows = []

    def add(way, predict, difference="", agreement=""):
        throughput = len(paths) / seconds_of(lambda: predict(paths), n_repeats)
        row = {
            "network": name if weights else f"{name} (random)",
            "": way,
            "difference": difference,
            "labels": agreement,
            "images/s": f"{throughput:.1f}",
            "one image (ms)": round(1000 * seconds_of(lambda: predict(paths[:1]), 3)),
        }
        print(row, flush=True)
        rows.append(row)

    add("pipeline", fitted.predict)
    for way, run in exports_of(fitted, folder).items():

        def predict(images, run=run):
            return run(crop_images(images, fitted[0].preprocessing_, n_jobs=n_threads))

        found = predict(paths)
        difference = np.abs(found["scores"] - scores).max() / np.abs(scores).max()
        is_equal = (fitted.classes_[found["index"]] == predicted).all()
        add(way, predict, f"{difference:.0e}", "equal" if is_equal else "different")
    return rows


def main():
    """Measure each network, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths, labels = find_images(args.images, folder)
        rows = [
            row
            for name in args.networks
            for row in measure(name, paths, labels, folder, args.repeats)
        ]
    print_table(rows)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
