"""
Cost of a search over layers with and without a cache
=====================================================

``GridSearchCV`` over 5 layers, 3 values of C and 5 folds, with four methods:

(a) no cache;
(b) ``Pipeline(memory=...)`` of scikit-learn;
(c) the cache of skltl, initially empty;
(d) the same cache, filled.

The table contains the total time, the time without scalers and classifiers, and the
number of images that went through the network, not counting padding.

    python bench_grid_search.py --data DIR --backbone squeezenet1_0 --weights FILE

``DIR`` contains one folder of images per class. Without it, images of noise are
generated, which take the same time.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from reporting import print_table, write_json
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl import CNNFeatureTransformer, list_layers
from skltl.inference import Runner

C = [0.001, 0.01, 0.1]
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)


class Crossings:
    """Count the images that go through a network."""

    def __init__(self):
        self.n = 0
        features = Runner.features

        def counted(runner, pixels, *others):
            self.n += int(pixels.flatten(1).any(dim=1).sum())
            return features(runner, pixels, *others)

        Runner.features = counted


def read_folders(folder):
    """Return the paths and labels of a folder of class folders."""
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    if not paths:
        raise SystemExit(f"{folder} has no folders of images")
    return [str(path) for path in paths], np.array([path.parent.name for path in paths])


def write_noise(folder, n=300, n_classes=5, size=(500, 375)):
    """Write JPEG files of color noise, with one color per class."""
    rng = np.random.default_rng(0)
    paths, labels = [], np.arange(n) % n_classes
    for number, label in enumerate(labels):
        noise = rng.normal(20 * label, 60, (size[1] // 5, size[0] // 5, 3))
        pixels = np.clip(noise + np.array([60, 100, 140]), 0, 255).astype(np.uint8)
        paths.append(str(Path(folder) / f"{number}.jpg"))
        Image.fromarray(pixels).resize(size).save(paths[-1])
    return paths, labels


def evenly(layers, n=5):
    """Choose `n` evenly spaced layers with a feature map, including the last."""
    names = [layer.name for layer in layers if layer.stride is not None]
    chosen = np.linspace(0, len(names) - 1, min(n, len(names))).round().astype(int)
    return [names[index] for index in chosen]


def timed(kind):
    """Return a subclass of an estimator that measures the time of its methods."""

    class Timed(kind):
        seconds = 0.0

    def wrapped(name):
        method = getattr(kind, name)

        def timed_method(self, *args, **kwargs):
            start = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                Timed.seconds += time.perf_counter() - start

        return timed_method

    for name in {"fit", "transform", "predict"} & set(dir(kind)):
        setattr(Timed, name, wrapped(name))
    # A name in this module, so that joblib can pickle instances of the class.
    Timed.__name__ = Timed.__qualname__ = f"Timed{kind.__name__}"
    return Timed


TimedStandardScaler = timed(StandardScaler)
TimedLinearSVC = timed(LinearSVC)


def search(transformer, layers, memory=None):
    """Return the search, which is the same for all methods."""
    scaler, svm = TimedStandardScaler(), TimedLinearSVC()
    steps = [("feat", transformer), ("scale", scaler), ("svm", svm)]
    grid = {"feat__layer": layers, "svm__C": C}
    return GridSearchCV(Pipeline(steps, memory=memory), grid, cv=FOLDS, refit=False)


def run(way, search, X, y, crossings):
    """Run a search; return a row of the table, and the scores."""
    TimedStandardScaler.seconds = TimedLinearSVC.seconds = 0.0
    n_before, start = crossings.n, time.perf_counter()
    search.fit(X, y)
    seconds = time.perf_counter() - start
    of_classifiers = TimedStandardScaler.seconds + TimedLinearSVC.seconds
    print(f"{way}: {seconds:.1f} s", flush=True)
    return {
        "way": way,
        "seconds": seconds,
        "less classifiers": seconds - of_classifiers,
        "crossed": crossings.n - n_before,
    }, search.cv_results_["mean_test_score"]


def compare_searches(make_transformer, layers, paths, labels, folder):
    """Run the search with all methods; return the rows of the table and ratios."""
    crossings = Crossings()
    plain = make_transformer().fit(paths)
    plain.transform(paths[:1])  # load the network before the measurements
    passes, cold = [], []
    for number in range(3):  # interleaved, since the load of a machine varies
        start = time.perf_counter()
        plain.transform(paths)
        passes.append(time.perf_counter() - start)
        own = make_transformer(cache=f"{folder}/own{number}")
        cold.append(
            run("(c) cache, cold", search(own, layers), paths, labels, crossings)
        )
    cold.sort(key=lambda row_and_scores: row_and_scores[0]["less classifiers"])
    warm = search(make_transformer(cache=f"{folder}/own0"), layers)
    memory = search(make_transformer(), layers, memory=f"{folder}/joblib")
    nothing = search(make_transformer(), layers)
    results = [
        run("(a) no cache", nothing, paths, labels, crossings),
        run("(b) Pipeline(memory)", memory, paths, labels, crossings),
        cold[1],  # the median
        run("(d) cache, warm", warm, paths, labels, crossings),
    ]
    rows, scores = zip(*results, strict=True)
    assert all((other == scores[0]).all() for other in scores), "scores differ"
    one_pass, network = median(passes), [row["less classifiers"] for row in rows]
    figures = {
        "images": len(paths),
        "layers": layers,
        "one plain pass, seconds": one_pass,
        "(c) less classifiers / one pass": network[2] / one_pass,
        "(b) / (c), less classifiers": network[1] / network[2],
        "(a) / (c), less classifiers": network[0] / network[2],
        "best score": float(scores[0].max()),
    }
    return list(rows), figures


def time_warm_reads(folder, n_arrays=20_000, n_files=5_000):
    """Return the throughput of a filled cache in images per second."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(256, size=(n_arrays, 8, 8), dtype=np.uint8)
    paths, _ = write_noise(folder, n_files, size=(40, 30))
    time.sleep(2.5)  # new files are not identified by their state yet
    figures = {}
    for name, X in {"arrays": arrays, "files": paths}.items():
        cached = CNNFeatureTransformer(
            "tiny", image_size=16, cache=f"{folder}/{name}"
        ).fit(X)
        cached.transform(X)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            cached.transform(X)
            seconds.append(time.perf_counter() - start)
        figures[f"warm {name}, images per second"] = len(X) / min(seconds)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of class folders")
    parser.add_argument("--backbone", default="squeezenet1_0")
    parser.add_argument("--weights", help="file, or name (default: random)")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", help="output file for the figures")
    arguments = parser.parse_args()

    def make_transformer(cache=None):
        return CNNFeatureTransformer(
            arguments.backbone,
            weights=arguments.weights,
            precision=arguments.precision,
            cache=cache,
            random_state=0,
        )

    with tempfile.TemporaryDirectory() as folder:
        paths, labels = (
            read_folders(arguments.data) if arguments.data else write_noise(folder)
        )
        layers = evenly(list_layers(arguments.backbone))
        rows, figures = compare_searches(
            make_transformer, layers, paths, labels, folder
        )
        figures |= time_warm_reads(folder)
    print_table(rows)
    for name, value in figures.items():
        print(
            f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}"
        )
    if arguments.json:
        write_json(arguments.json, {"rows": rows, **figures})


if __name__ == "__main__":
    main()
