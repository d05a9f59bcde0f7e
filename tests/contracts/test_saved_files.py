"""Saved estimators name only public paths, so that private modules may move."""

import io
import pickle

import pytest
import skops.io
from torch import nn

from skltl import Backbone, CNNFeatureTransformer, Preprocessing


@pytest.fixture(scope="module")
def fitted_with_own_backbone(shared_images):
    own = Backbone.from_blocks(
        "own", {"stem": nn.Conv2d(3, 4, 3)}, preprocessing=Preprocessing(16)
    )
    return CNNFeatureTransformer(own).fit(shared_images)


class RecordingUnpickler(pickle.Unpickler):
    """Collect the paths of all classes and functions that a pickle names."""

    def __init__(self, file):
        super().__init__(file)
        self.paths = set()

    def find_class(self, module, name):
        self.paths.add(f"{module}.{name}")
        return super().find_class(module, name)


def paths_in_pickle(fitted):
    unpickler = RecordingUnpickler(io.BytesIO(pickle.dumps(fitted)))
    unpickler.load()
    return unpickler.paths


def paths_in_skops(fitted):
    return set(skops.io.get_untrusted_types(data=skops.io.dumps(fitted)))


def private(paths):
    """Return the paths of skltl that have a private part."""
    return {
        path
        for path in paths
        if path.startswith("skltl.")
        and any(part.startswith("_") for part in path.split("."))
    }


@pytest.mark.parametrize("paths", [paths_in_pickle, paths_in_skops])
def test_saved_files_name_only_public_paths(paths, fitted):
    found = paths(fitted)

    assert any(path.startswith("skltl.") for path in found)
    assert private(found) == set()


# skops stores no modules of torch: an own backbone is saved with pickle or joblib.
def test_a_pickle_with_an_own_backbone_names_only_public_paths(
    fitted_with_own_backbone,
):
    found = paths_in_pickle(fitted_with_own_backbone)

    assert any(path.startswith("skltl.") for path in found)
    assert private(found) == set()
