"""
A search over cut points: how often the network runs, and what it costs
=======================================================================

``GridSearchCV`` over 5 cut points, 3 values of C and 5 folds, in four ways:

(a) no cache;
(b) scikit-learn's ``Pipeline(memory=...)``;
(c) skltl's cache, empty at first;
(d) the same cache again, in which everything is there.

Beside the seconds in all stand those less the classifiers' own time, and the pictures
that crossed the network: they are counted, those that only fill up a batch left out.

    python bench_grid_search.py --data DIR --backbone squeezenet1_0 --weights FILE

``DIR`` has one folder of pictures for each class. Without it, noise is classified by a
network with random weights, which takes the same time.
"""

import argparse
import tempfile
import time
from contextlib import contextmanager
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
from skltl.backbones import Runner

C = [0.001, 0.01, 0.1]
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)


class Crossings:
    """Count the pictures that cross a network."""

    def __init__(self):
        self.n = 0
        features = Runner.features

        def counted(runner, pixels, *others):
            self.n += int(pixels.flatten(1).any(dim=1).sum())
            return features(runner, pixels, *others)

        Runner.features = counted

    @contextmanager
    def measured(self, row):
        """Put seconds and crossings of a block of code into a row of the table."""
        before, start = self.n, time.perf_counter()
        yield
        row["seconds"] = time.perf_counter() - start
        row["crossed"] = self.n - before


def read_folders(folder):
    """Return paths and labels of a folder of class folders."""
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    return [str(path) for path in paths], np.array([path.parent.name for path in paths])


def write_noise(folder, n=300, n_classes=5, size=(500, 375)):
    """Write JPEG files of coloured noise; the colour is the class."""
    rng = np.random.default_rng(0)
    paths, labels = [], np.arange(n) % n_classes
    for number, label in enumerate(labels):
        noise = rng.normal(20 * label, 60, (size[1] // 5, size[0] // 5, 3))
        pixels = np.clip(noise + np.array([60, 100, 140]), 0, 255).astype(np.uint8)
        paths.append(str(Path(folder) / f"{number}.jpg"))
        Image.fromarray(pixels).resize(size).save(paths[-1])
    return paths, labels


def evenly(layers, n=5):
    """Choose so many of the cut points with a feature map, the last one included."""
    names = [layer.name for layer in layers if layer.stride is not None]
    chosen = np.linspace(0, len(names) - 1, min(n, len(names))).round().astype(int)
    return [names[index] for index in chosen]


def search(transformer, layers, memory=None):
    """Return the search that all ways run."""
    steps = [("feat", transformer), ("scale", StandardScaler()), ("svm", LinearSVC())]
    grid = {"feat__layer": layers, "svm__C": C}
    return GridSearchCV(Pipeline(steps, memory=memory), grid, cv=FOLDS, refit=False)


def time_of_classifiers(transformer, layers, paths, labels):
    """Return the seconds of all scalers and classifiers alone."""
    seconds = 0.0
    for layer in layers:
        features = transformer.set_params(layer=layer).fit_transform(paths)
        steps = [("scale", StandardScaler()), ("svm", LinearSVC())]
        alone = GridSearchCV(Pipeline(steps), {"svm__C": C}, cv=FOLDS, refit=False)
        start = time.perf_counter()
        alone.fit(features, labels)
        seconds += time.perf_counter() - start
    return seconds


def compare_searches(make_transformer, layers, paths, labels, folder):
    """Run the search in the four ways; return the rows of the table and the limits."""
    crossings = Crossings()
    plain = make_transformer().fit(paths)
    plain.transform(paths[:1])  # the network is loaded once, before anything is timed
    passes, classifiers = [], []  # before and after the searches

    def time_the_parts():
        for _ in range(2):
            start = time.perf_counter()
            plain.transform(paths)
            passes.append(time.perf_counter() - start)
        classifiers.append(
            time_of_classifiers(make_transformer(), layers, paths, labels)
        )

    time_the_parts()

    ways = {
        "(a) no cache": search(make_transformer(), layers),
        "(b) Pipeline(memory)": search(make_transformer(), layers, f"{folder}/joblib"),
        "(c) cache, cold": search(make_transformer(cache=f"{folder}/own"), layers),
        "(d) cache, warm": search(make_transformer(cache=f"{folder}/own"), layers),
    }
    rows, scores = [], []
    for name, way in ways.items():
        row = {"way": name}
        with crossings.measured(row):
            way.fit(paths, labels)
        rows.append(row)
        scores.append(way.cv_results_["mean_test_score"])
        print(f"{name}: {row['seconds']:.1f} s", flush=True)
    assert all((other == scores[0]).all() for other in scores), "scores differ"
    time_the_parts()
    one_pass, of_classifiers = median(passes), median(classifiers)
    for row in rows:
        row["less classifiers"] = row["seconds"] - of_classifiers
    figures = {
        "pictures": len(paths),
        "layers": layers,
        "one pass, seconds": one_pass,
        "classifiers, seconds": of_classifiers,
        "limit of (c), seconds": 1.3 * one_pass + of_classifiers,
        "(b) / (c) less classifiers": rows[1]["less classifiers"]
        / rows[2]["less classifiers"],
        "best score": float(scores[0].max()),
    }
    return rows, figures


def time_warm_reads(folder, n_arrays=20_000, n_files=5_000):
    """Return how many pictures a second come from a warm cache."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(256, size=(n_arrays, 8, 8), dtype=np.uint8)
    paths, _ = write_noise(folder, n_files, size=(40, 30))
    time.sleep(2.5)  # files just written are not yet known by their state
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
        figures[f"warm {name}, pictures per second"] = len(X) / min(seconds)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="a folder of class folders")
    parser.add_argument("--backbone", default="squeezenet1_0")
    parser.add_argument("--weights", help="a file, or a name; random if not given")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", help="where to write the figures")
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
