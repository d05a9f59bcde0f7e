"""Crops of images for a network, as one array."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl._large_arrays import new_array
from skltl.images._batches import iter_crops
from skltl.images._preprocessing import Preprocessing, as_float
from skltl.images._source import (
    ImageSource,
    Reader,
    check_reader,
    check_value_range,
    read_images,
)


def crop_images(
    X: Any,
    preprocessing: Preprocessing,
    *,
    image_shape: tuple[int, ...] | None = None,
    reader: Reader | None = None,
    value_range: tuple[float, float] | None = None,
    n_jobs: int = 1,
) -> NDArray[Any]:
    """Decode, resize and crop images for a network, without torch or scikit-learn.

    The result is the input of a model that was exported by :func:`~skltl.to_torch`,
    :func:`~skltl.export_onnx` or :func:`~skltl.export_openvino`. The pixels are those
    that the exported estimator computes itself.

    Parameters
    ----------
    X : sequence of n images, or array of shape (n, d) with `image_shape`
        Images of any kind, as for `CNNFeatureTransformer`: paths, encoded images, PIL
        images or arrays.
    preprocessing : Preprocessing
        Preprocessing of the network: the attribute `preprocessing_` of a fitted
        estimator, or that of an exported file.
    image_shape : tuple of 2 or 3 ints, default=None
        Shape of the image in each row of an array (n, d).
    reader : callable, default=None
        Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
    value_range : tuple of 2 floats, default=None
        Values of black and white, as for `CNNFeatureTransformer`.
    n_jobs : int, default=1
        Number of decoding threads.

    Returns
    -------
    array of shape (n, height, width, n_channels), uint8 or float32
        Crops. They are float32, in [0, 1], if an image has other than 8 bits per
        channel.

    Raises
    ------
    ImageReadError
        For the first image that cannot be read; the message names its index and path.
    TypeError, ValueError
        If ``X`` is not a sequence of images.

    See Also
    --------
    export_onnx : Export a fitted estimator to a file for ONNX Runtime.

    Notes
    -----
    It needs NumPy and Pillow, but neither torch nor scikit-learn, so that a program
    that runs an exported model does not have to install them. Only a transformer with
    ``decode="fast"`` has other pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import Preprocessing, crop_images
    >>> images = np.zeros((2, 300, 400, 3), dtype=np.uint8)
    >>> crop_images(images, Preprocessing(224, resize_size=256)).shape
    (2, 224, 224, 3)
    """
    if not isinstance(preprocessing, Preprocessing):
        raise TypeError(
            "preprocessing must be a skltl.Preprocessing, got "
            f"{type(preprocessing).__name__}."
        )
    check_reader(reader)
    check_value_range(value_range)
    source = read_images(
        X,
        image_shape,
        reader=reader,
        value_range=value_range,
        n_channels=preprocessing.n_channels,
    )
    return decode_crops(source, preprocessing, n_jobs)


def decode_crops(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Decode, resize and crop all images: (n, h, w, c), uint8 if all of them are."""
    everything = range(len(source))
    shape = (len(source), *preprocessing.size, preprocessing.n_channels)
    array = new_array(shape, np.uint8)
    with closing(iter_crops(source, everything, preprocessing, 8, n_threads)) as crops:
        for crop in crops:
            if crop.pixels.dtype != array.dtype and array.dtype == np.uint8:
                decoded = array
                array = new_array(array.shape, np.float32)
                for position, pixels in enumerate(decoded[: crop.position]):
                    array[position] = as_float(pixels)
            is_float = array.dtype != np.uint8
            array[crop.position] = as_float(crop.pixels) if is_float else crop.pixels
    source.warn_of_odd_range()
    return array
