"""
Choosing a layer
================

The first blocks of a ConvNet respond to edges and textures, the last ones to the
objects that it was trained on. Which layer gives the best features depends on the
images, so ``layer`` is tuned like any other hyperparameter.

With a cache, such a search is cheap. The network runs once on each image, the features
of all main layers are stored, and all folds and candidates read them. With
``cache=True`` they are stored in the user's cache directory, with ``cache="folder"`` in
that folder.
"""

# %%
# Search over layers
# ------------------
# 600 handwritten digits; five layers, three values of ``C`` and five folds: 75 fits of
# a pipeline that begins with a ConvNet.

import tempfile
import time

from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skltl import LayerScoresDisplay, cache_info, list_layers, make_feature_pipeline

digits, labels = load_digits(return_X_y=True)
digits, labels = digits[:600] / 16, labels[:600]

folder = tempfile.TemporaryDirectory()  # in practice: cache=True
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
# Score by layer
# --------------
# Digits are unlike the photographs that the network was trained on, so the last layer
# is not the best one: its features are specific to the objects in those photographs.
# The bands are one standard deviation over the folds; the star marks the best
# candidate.

LayerScoresDisplay.from_search(search)

# %%
# To compare all main layers with the other parameters fixed, no search is needed:

pipeline.set_params(softmax__C=0.01)
LayerScoresDisplay.from_estimator(pipeline, digits, labels)

# %%
# Contents of the cache
# ---------------------
# The cache has one database for each layer, with one row for each image.

for entry in cache_info(folder.name).entries:
    kilobytes = entry.n_bytes / 1000
    print(f"{entry.layer:<8}{entry.n_images:>6} images{kilobytes:>8.0f} kB")

folder.cleanup()
