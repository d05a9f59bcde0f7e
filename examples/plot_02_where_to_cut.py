"""
Where to cut the network
========================

Early blocks of a ConvNet know edges and textures, late ones the things it was trained
on. Which of them serves best depends on the images, so the cut point is searched for
like any other parameter.

With a cache this is cheap. Each image crosses the network once, what it gives at
every main cut point is kept, and all folds and candidates read it from there:
``cache=True`` keeps it in the user's cache directory, ``cache="folder"`` in a folder.
"""

# %%
# The search
# ----------
# 600 handwritten digits; five cut points, three values of ``C``, five folds: 75 fits
# of a pipeline that begins with a ConvNet.

import tempfile
import time

from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skltl import LayerScoresDisplay, cache_info, list_layers, make_feature_pipeline

digits, labels = load_digits(return_X_y=True)
digits, labels = digits[:600] / 16, labels[:600]

folder = tempfile.TemporaryDirectory()  # in earnest: cache=True
pipeline = make_feature_pipeline(
    "tiny", "softmax", image_shape=(8, 8), image_size=32, cache=folder.name
)
grid = {
    "feat__layer": [layer.name for layer in list_layers("tiny")],
    "softmax__C": [0.001, 0.01, 0.1],
}
search = GridSearchCV(pipeline, grid, cv=5)

start = time.perf_counter()
search.fit(digits, labels)
print(f"{search.best_params_}: {search.best_score_:.3f}")
print(f"{time.perf_counter() - start:.1f} s for 75 fits")

# %%
# What the scores look like along the network
# -------------------------------------------
# Digits are unlike the photographs that the network was trained on, so the last cut is
# not the best: what the last block knows is about animals and things.

LayerScoresDisplay.from_search(search)

# %%
# For one pipeline, without a search of one's own, and over all main cut points:

pipeline.set_params(softmax__C=0.01)
LayerScoresDisplay.from_estimator(pipeline, digits, labels)

# %%
# What the cache holds
# --------------------
# One database for each cut point, and in it a row for each image.

for entry in cache_info(folder.name).entries:
    kilobytes = entry.n_bytes / 1000
    print(f"{entry.layer:<8}{entry.n_images:>6} images{kilobytes:>8.0f} kB")

folder.cleanup()
