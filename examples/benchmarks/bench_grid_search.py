"""
A search over cut points: how often the network runs, and what it costs
=======================================================================

``GridSearchCV`` over 5 cut points, 3 values of C and 5 folds, in four ways:

(a) no cache;
(b) scikit-learn's ``Pipeline(memory=...)``;
(c) skltl's cache, empty at first;
(d) the same cache again, in which everything is there.

Beside the seconds in all stand those less the classifiers' own time, and the images
that crossed the network: they are counted, those that only fill up a batch left out.

    python bench_grid_search.py --data DIR --backbone squeezenet1_0 --weights FILE

``DIR`` has one folder of images for each class. Without it, noise is classified by a
network with random weights, which takes the same time.
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
    """Count the images that cross a network."""

    def __init__(self):
        self.n = 0
        features = Runner.features

        def counted(runner, pixels, *others):
            self.n += int(pixels.flatten(1).any(dim=1).sum())
            return features(runner, pixels, *others)

        Runner.features = counted


def read_folders(folder):
    """Return paths and labels of a folder of class folders."""
    paths = sorted(path for path in Path(folder).glob("*/*") if path.is_file())
    if not paths:
        raise SystemExit(f"{folder} has no folders of images")
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


def timed(kind):
    """Make an estimator class that counts the seconds of its own fits and uses."""

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
    # Of the module, so that joblib can store what the class has made.
    Timed.__name__ = Timed.__qualname__ = f"Timed{kind.__name__}"
    return Timed


TimedStandardScaler = timed(StandardScaler)
TimedLinearSVC = timed(LinearSVC)


def search(transformer, layers, memory=None):
    """Return the search that all ways run."""
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
    """Run the search in the four ways; return the rows of the table and the ratios."""
    crossings = Crossings()
    plain = make_transformer().fit(paths)
    plain.transform(paths[:1])  # the network is loaded once, before anything is timed
    passes, cold = [], []
    for number in range(3):  # interleaved: machines have moods
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
    found = [
        run("(a) no cache", nothing, paths, labels, crossings),
        run("(b) Pipeline(memory)", memory, paths, labels, crossings),
        cold[1],  # the median
        run("(d) cache, warm", warm, paths, labels, crossings),
    ]
    rows, scores = zip(*found, strict=True)
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
    """Return how many images a second come from a warm cache."""
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
        figures[f"warm {name}, images per second"] = len(X) / min(seconds)
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
