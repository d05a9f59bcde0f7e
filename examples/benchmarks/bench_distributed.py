"""
Features by Dask on two workers and by a plain transform
========================================================

Throughput, peak memory of the client and of the workers, and size of the graph for
10,000 and 100,000 small JPEG files, which are generated. The graph is pickled with the
weights, and without them (``store_weights=False``). Features are written to disk, as
those of more images than memory holds: by Dask block by block, by the plain way at
once. Each measurement is made in a new process. The network is loaded, and the workers
have imported torch, before time is taken.

    python bench_distributed.py --images 10000 100000 --chunk 1000
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from reporting import print_table, write_json

SIDE = 64

# Code that is run in a new process and prints JSON.
COMMON = """
import json, resource, sys, time
import numpy as np
from pathlib import Path
from skltl import CNNFeatureTransformer
backbone, weights, store = *sys.argv[1:3], Path(sys.argv[3])
chunk, n_workers, n_threads, malloc = map(int, sys.argv[4:])
if __name__ == "__main__":  # workers of Dask import this script
    paths = np.array(json.loads(sys.stdin.read()), dtype=object)
transformer = CNNFeatureTransformer(backbone, weights=weights, random_state=0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""
PLAIN = (
    COMMON
    + """
import torch
torch.set_num_threads(n_threads)
transformer.fit(paths).transform(paths[:100])
start = time.perf_counter()
np.save(store / "features.npy", transformer.transform(paths))
seconds = time.perf_counter() - start
total = np.load(store / "features.npy", mmap_mode="r").sum(dtype=float)
print(json.dumps([seconds, peak(), 0, [0, 0], float(total)]))
"""
)
DASK = (
    COMMON
    + """
import dask, dask.array as da
from distributed import Client, LocalCluster
from distributed.protocol import pickle
def bytes_of(lazy):
    (graph,) = dask.optimize(lazy)
    return len(pickle.dumps(dict(graph.__dask_graph__())))
def main():
    shape = {"n_workers": n_workers, "threads_per_worker": 1}
    environ = "distributed.nanny.pre-spawn-environ"
    variables = {"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads}
    if malloc:
        variables["MALLOC_TRIM_THRESHOLD_"] = malloc << 20
        variables["MALLOC_MMAP_THRESHOLD_"] = 32 << 20  # the most that glibc takes
    with dask.config.set({f"{environ}.{name}": variables[name] for name in variables}):
        cluster = LocalCluster(**shape, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        transformer.fit(paths)
        first = da.from_array(paths[:200], chunks=100)
        transformer.transform(first).compute()
        start = time.perf_counter()
        lazy = transformer.transform(da.from_array(paths, chunks=chunk))
        da.to_npy_stack(store, lazy)
        seconds = time.perf_counter() - start
        of_workers = max(client.run(peak).values())
        of_client = peak()
        size = bytes_of(lazy)
        transformer.set_params(store_weights=False).fit(paths)
        without = bytes_of(transformer.transform(da.from_array(paths, chunks=chunk)))
    total = sum(np.load(path).sum(dtype=float) for path in store.glob("*.npy"))
    print(json.dumps([seconds, of_client, of_workers, [size, without], float(total)]))
if __name__ == "__main__":
    main()
"""
)
# Code, numbers of workers and of threads of each, and MiB that the C library keeps
# instead of returning them.
WAYS = {
    "plain, 1 thread": (PLAIN, 1, 1, 0),
    "plain, 2 threads": (PLAIN, 1, 2, 0),
    "Dask, 1 x 1 thread": (DASK, 1, 1, 0),
    "Dask, 1 x 2 threads": (DASK, 1, 2, 0),
    "Dask, 2 x 1 thread": (DASK, 2, 1, 0),
    "Dask, 2 x 1 thread, memory kept": (DASK, 2, 1, 1024),
    "Dask, 2 x 2 threads": (DASK, 2, 2, 0),
}


def create_files(folder, n):
    """Create small JPEG files of smooth noise, and return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(n):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = Path(folder) / f"{number // 1000:03}" / f"{number:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(path, quality=90)
        paths.append(str(path))
    return paths


def measure(code, folder, paths, *arguments):
    """Run code as a script in a new process; return what it prints."""
    script = Path(folder) / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure each way and number of images, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json")
    args = parser.parse_args()
    rows, sums = [], {}
    with tempfile.TemporaryDirectory() as folder:
        files = create_files(folder, max(args.images))
        for n_images in args.images:
            paths = files[:n_images]
            for way in args.ways:
                code, *numbers = WAYS[way]
                with tempfile.TemporaryDirectory() as store:
                    arguments = args.backbone, args.weights, store, args.chunk
                    seconds, client, workers, graphs, total = measure(
                        code, folder, paths, *arguments, *numbers
                    )
                sums.setdefault(n_images, total)
                assert np.isclose(total, sums[n_images], rtol=1e-6), "other features"
                row = {
                    "": way,
                    "images": n_images,
                    "images/s": round(n_images / seconds),
                    "client (MiB)": round(client),
                    "worker (MiB)": round(workers),
                    "graph (bytes)": graphs[0],
                    "without weights": graphs[1],
                }
                print(row, flush=True)
                rows.append(row)
    print_table(rows)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
