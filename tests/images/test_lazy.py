"""Lazy sequences: only what is needed is fetched, once, and by one thread at a time."""

import collections
import threading
import time

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from peak_memory import measured
from PIL import Image
from sklearn.model_selection import cross_val_predict
from torchvision.datasets import ImageFolder

from skltl import CNNFeatureTransformer, find_bad_images, make_feature_pipeline
from skltl.exceptions import ImageReadError
from skltl.images import read_images


class Column(collections.abc.Sequence):
    """A column of Hugging Face: an image is decoded when it is fetched."""

    def __init__(self, items):
        self.items = items
        self.fetched = []
        self._busy = threading.Lock()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        assert type(index) is int
        assert self._busy.acquire(blocking=False), "two threads at the same time"
        time.sleep(0.001)
        self._busy.release()
        self.fetched.append(index)
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Pairs(torch.utils.data.Dataset):
    """A dataset of torch: tensors (3, h, w) and labels."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return torch.tensor(self.arrays[index]).permute(2, 0, 1), index % 2


class OnDisk:
    """An array like those of h5py and zarr."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return self.array[index]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the whole array is read")


SEQUENCES = {
    "column of images": lambda arrays: Column([*map(Image.fromarray, arrays)]),
    "column of arrays": lambda arrays: Column(list(arrays)),
    "user list": lambda arrays: collections.UserList(arrays),
    "deque": lambda arrays: collections.deque(map(Image.fromarray, arrays)),
    "dataset": Pairs,
    "subset": lambda arrays: torch.utils.data.Subset(Pairs(arrays), range(len(arrays))),
    "array on disk": OnDisk,
    "channels first": lambda arrays: OnDisk(arrays.transpose(0, 3, 1, 2)),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_lazy_sequences_hold_the_same_images(images, kind):
    source = read_images(SEQUENCES[kind](images))

    assert len(source) == len(images)
    np.testing.assert_array_equal([*source], images)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_lazy_sequences_have_the_same_features(images, kind, cache, tmp_path):
    transformer = CNNFeatureTransformer("tiny", image_size=32)
    expected = transformer.fit_transform(images)
    transformer.set_params(cache=tmp_path if cache else None)
    X = SEQUENCES[kind](images)

    found = [transformer.fit_transform(X) for _ in range(2)]

    np.testing.assert_array_equal(found, [expected, expected])


@pytest.mark.parametrize("cache", [False, True])
def test_each_image_is_fetched_once(images, cache, tmp_path):
    column = Column([*map(Image.fromarray, images)])
    transformer = CNNFeatureTransformer("tiny", image_size=32, n_jobs=4)
    transformer.set_params(cache=tmp_path if cache else None).fit(column)
    assert column.fetched == [0]

    transformer.transform(column)

    assert sorted(column.fetched) == sorted([0, *range(len(images))])


def test_an_image_folder_of_torchvision_is_a_sequence(images, tmp_path):
    for number, image in enumerate(images):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    dataset = ImageFolder(tmp_path)
    paths = [path for path, _ in dataset.imgs]

    for found, expected in zip(read_images(dataset), read_images(paths), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_data_set_can_be_cross_validated(images):
    """scikit-learn selects lists of pairs from it."""
    dataset, y = Pairs(images), np.arange(len(images)) % 2
    classifier = make_feature_pipeline("tiny", "softmax", layer="block1")
    selected = [dataset[index] for index in range(len(images))]

    scores = cross_val_predict(classifier, dataset, y, cv=3, method="predict_proba")

    expected = cross_val_predict(classifier, images, y, cv=3, method="predict_proba")
    assert_array_equal(scores, expected)
    assert_array_equal(list(read_images(selected)), list(read_images(images)))


def test_paths_in_a_sequence_are_files(image_files):
    source = read_images(collections.UserList(image_files))

    assert [source.path(index) for index in range(len(source))] == [
        str(path) for path in image_files
    ]


@pytest.mark.parametrize("position", [0, 2])
def test_the_errors_of_a_sequence_are_named(images, position):
    items = [*map(Image.fromarray, images)]
    items[position] = LookupError("row is gone")
    column = Column(items)

    with pytest.raises(ImageReadError, match=f"Image {position} .*LookupError.*gone"):
        CNNFeatureTransformer("tiny", image_size=32).fit_transform(column)
    assert [bad.index for bad in find_bad_images(column)] == [position]


def test_the_first_item_says_where_the_channels_are():
    narrow = np.zeros((3, 5, 3), np.uint8)
    narrow[0] = 255  # the red channel, if channels are first
    column = Column([np.zeros((3, 5, 7), np.uint8), narrow])

    assert (read_images(column)[1] == [255, 0, 0]).all()


def test_a_bad_first_item_says_nothing_of_the_others(images):
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images[:4]]
    X = Column([OSError("gone"), *tensors[1:]])
    transformer = CNNFeatureTransformer("tiny", layer="block1", on_error="nan")

    features = transformer.fit_transform(X)

    assert [bad.index for bad in transformer.bad_images_] == [0]
    expected = CNNFeatureTransformer("tiny", layer="block1").fit_transform(images[1:4])
    assert_array_equal(features[1:], expected)


@pytest.mark.parametrize(
    "label", [3, 0.5, "rose", None, np.int64(3), torch.tensor(3), torch.zeros(5)]
)
def test_labels_of_any_kind_are_ignored(images, label):
    pairs = [(image, label) for image in images]

    for X in (pairs, Column(pairs)):
        assert_array_equal(list(read_images(X)), images)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="0 sample"):
        read_images(Column([]))


# 10,000 images of 786 kB, of which a process holds a few at a time.
MANY = """
from skltl import CNNFeatureTransformer

class Many:
    def __init__(self, n):
        self.n_fetched = np.zeros(n, int)

    def __len__(self):
        return len(self.n_fetched)

    def __getitem__(self, index):
        self.n_fetched[index] += 1
        return np.full((512, 512, 3), index % 256, np.uint8)

transformer = CNNFeatureTransformer("tiny", image_size=16)
transformer.fit_transform(Many(300))
before, many = peak(), Many(10_000)
transformer.transform(many)
print(peak() - before, many.n_fetched.min(), many.n_fetched.max())
"""


@pytest.mark.slow
def test_many_images_take_no_more_memory_than_some():
    pytest.importorskip("resource")

    taken, *n_fetched = measured(MANY)

    assert n_fetched == [1, 1]
    assert taken < 100e6  # all of them would take 7.9 GB
