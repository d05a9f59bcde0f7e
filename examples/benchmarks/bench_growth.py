"""
Scaling with the number of images, and latency of the first image
=================================================================

Time per image and peak memory for 100, 1,000 and 10,000 images (the images of a
folder, repeated); both should be constant. Then, in a new process: the time of the
import, of the first ``transform`` of one image, of the first of a clone, and of a later
one, with the default batch size and with ``batch_size=1``.

    python bench_growth.py --data DIR --backbone squeezenet1_0
"""

import argparse
import json
import subprocess
import sys

from bench_grid_search import read_folders
from reporting import print_table, write_json

# Code that is run in a new process and prints JSON.
GROWTH = """
import json, resource, sys, time
from skltl import CNNFeatureTransformer
paths = json.loads(sys.stdin.read())
fitted = CNNFeatureTransformer(sys.argv[1], weights=None, random_state=0,
                               engine=sys.argv[2]).fit(paths)
fitted.transform(paths[:8])
start = time.perf_counter()
shape = fitted.transform(paths).shape
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak, shape[1]]))
"""
FIRST = """
import json, sys, time
start = time.perf_counter()
path = json.loads(sys.stdin.read())[:1]
seconds = {}
def lap(name):
    global start
    seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
from sklearn.base import clone
from skltl import CNNFeatureTransformer
transformer = CNNFeatureTransformer(sys.argv[1], weights=None, random_state=0,
                                    engine=sys.argv[2])
lap("import")
transformer.fit(path).transform(path)
lap("first")
clone(transformer).fit(path).transform(path)
lap("clone")
def one_later():
    transformer.transform(path)
    laps = []
    for _ in range(20):
        start = time.perf_counter()
        transformer.transform(path)
        laps.append(time.perf_counter() - start)
    return sorted(laps)[10]
seconds["one later"] = one_later()
transformer.set_params(batch_size=1)
seconds["batch of 1"] = one_later()
print(json.dumps(seconds))
"""


def run(code, paths, *arguments):
    """Run code in a new process; return its decoded output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--backbone", default="squeezenet1_0")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--counts", nargs="*", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()

    paths, _ = read_folders(arguments.data)
    network = (arguments.backbone, arguments.engine)
    unit = 1 if sys.platform == "darwin" else 1024  # unit of `ru_maxrss` in bytes
    growth = []
    for count in arguments.counts:
        many = (paths * (count // len(paths) + 1))[:count]
        seconds, peak, n_features = run(GROWTH, many, *network)
        growth.append(
            {
                "images": count,
                "ms an image": 1000 * seconds / count,
                "peak, MB": peak * unit / 1e6,
                "of it output, MB": count * n_features * 4 / 1e6,
            }
        )
        print_table(growth[-1:])
    seconds = run(FIRST, paths, *network)
    first = [{"engine": arguments.engine}]
    first[0] |= {f"{name}, ms": 1000 * value for name, value in seconds.items()}
    print_table(first)
    if arguments.json:
        write_json(arguments.json, {"growth": growth, "first": first})


if __name__ == "__main__":
    main()
