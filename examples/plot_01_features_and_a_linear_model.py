"""
Features of a ConvNet and a linear model
========================================

A few images per class are not enough to train a ConvNet, but they are enough for a
linear classifier on the features of one that was trained on something else. Here the
images are handwritten digits, 10 of each for training, and the network is ``tiny``,
which comes with skltl and has only ever seen photographs of animals and things.

The digits lie in rows of 64 numbers from 0 to 16; ``image_shape=(8, 8)`` says that each
row is an image. They are little like the photographs, so the network is cut early,
after ``block3``: later layers know more about photographs, and less about strokes of a
pen. Eight pixels need not be enlarged to the usual 80, ``image_size=32`` is enough.
"""

# %%
# Three linear classifiers, on raw pixels and on features
# -------------------------------------------------------

from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline

from skltl import make_feature_pipeline

digits, labels = load_digits(return_X_y=True)
digits = digits / 16

splits = StratifiedShuffleSplit(
    n_splits=5, train_size=100, test_size=1000, random_state=0
)

print(f"{'accuracy':<12}{'raw pixels':>12}{'features':>12}")
for classifier in ("svm", "softmax", "ovr"):
    pipeline = make_feature_pipeline(
        "tiny", classifier, layer="block3", image_shape=(8, 8), image_size=32
    )
    without_network = make_pipeline(*(step for _, step in pipeline.steps[1:]))
    on_pixels = cross_val_score(without_network, digits, labels, cv=splits).mean()
    on_features = cross_val_score(pipeline, digits, labels, cv=splits).mean()
    print(f"{classifier:<12}{on_pixels:>12.3f}{on_features:>12.3f}")

# %%
# Each pipeline is an ordinary scikit-learn estimator: ``fit``, ``predict``,
# ``cross_val_score`` and ``GridSearchCV`` work as always, and images can be file
# paths just as well as rows.
