"""Feature extraction with other packages, each used as documented.

All networks have random weights: nothing is downloaded, and the throughput does not
depend on them.
"""

import warnings
from importlib.util import find_spec
from unittest import mock

import torch
import torchvision
from bench_fine_tuning import ImageFiles
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 32


def by_hand(backbone, paths, n_workers=0):
    """Use a manual loop: torchvision's transforms, a ``DataLoader``, float32."""
    model = torchvision.models.get_model(backbone).eval()
    layers = model.features if hasattr(model, "features") else None
    if layers is None:
        layers = nn.Sequential(*list(model.children())[:-2])

    @torch.no_grad()
    def run():
        files = ImageFiles(paths, paths)
        loader = DataLoader(files, BATCH_SIZE, num_workers=n_workers)
        return torch.cat([layers(batch).mean(dim=(2, 3)) for batch, _ in loader])

    return run


def with_embetter(backbone, paths):
    """Use ``ImageLoader`` and ``TimmEncoder`` in a pipeline."""
    import timm
    from embetter.vision import ImageLoader, TimmEncoder
    from sklearn.pipeline import make_pipeline

    if not timm.is_model(backbone):
        return None
    create = timm.create_model

    def untrained(name, pretrained, **others):
        return create(name, **others)

    with mock.patch.object(timm, "create_model", untrained):
        encoder = TimmEncoder(backbone)
    # Not done by embetter: batch normalization would depend on the images.
    encoder.model.eval()
    pipeline = make_pipeline(ImageLoader(), encoder)
    return lambda: pipeline.fit_transform(paths)


def with_img2vec(backbone, paths):
    """Use ``Img2Vec.get_vec`` on 32 images at a time."""
    from img2vec_pytorch import Img2Vec, img_to_vec

    name = {"vgg16": "vgg16_bn"}.get(backbone, backbone)  # its only VGG-16
    if not hasattr(img_to_vec, name):
        return None

    def untrained(weights):
        return torchvision.models.get_model(name)

    with mock.patch.object(img_to_vec, name, untrained):
        extractor = Img2Vec(model=backbone)

    def run():
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            extractor.get_vec([Image.open(path).convert("RGB") for path in batch])

    return run


def with_fastai(backbone, paths, n_workers=0):
    """Use ``get_preds`` of a learner whose network ends with pooling."""
    from fastai.vision.all import (
        ImageDataLoaders,
        Learner,
        MSELossFlat,
        Normalize,
        Resize,
        create_body,
        imagenet_stats,
    )

    loaders = ImageDataLoaders.from_lists(
        ".",
        paths,
        [0.0] * len(paths),
        item_tfms=Resize(224),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
        bs=BATCH_SIZE,
        num_workers=n_workers,
    )
    body = create_body(torchvision.models.get_model(backbone), pretrained=False)
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = Learner(loaders, model, loss_func=MSELossFlat())

    def run():
        with learner.no_bar(), learner.no_logging():
            learner.get_preds(dl=loaders.test_dl(paths, num_workers=n_workers))

    return run


def with_timm(backbone, paths, n_workers=0):
    """Use the network's own transforms, a DataLoader, inference mode."""
    import timm

    if not timm.is_model(backbone):
        return None
    model = timm.create_model(backbone, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)

    @torch.inference_mode()
    def run():
        files = Transformed(paths, transform)
        loader = DataLoader(files, BATCH_SIZE, num_workers=n_workers)
        return torch.cat([model(batch) for batch in loader])

    return run


class Transformed(Dataset):
    """Image files, opened and transformed one by one."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


# Required package, and numbers of workers to compare.
PEERS = {
    "manual loop": (by_hand, "torchvision", (0, 2)),
    "embetter": (with_embetter, "embetter", ()),
    "img2vec_pytorch": (with_img2vec, "img2vec_pytorch", ()),
    "fastai": (with_fastai, "fastai", (0, 2)),
    "timm": (with_timm, "timm", (0, 2)),
}


def peers(backbone, paths):
    """Return a function for each installed package that provides the network."""
    ways = {}
    for name, (make, package, workers) in PEERS.items():
        if find_spec(package) is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of the packages
            for n in workers or [None]:
                run = make(backbone, paths, *([] if n is None else [n]))
                label = name if n is None else f"{name}, {n} workers"
                if run is not None:
                    ways[label] = run
    return ways
