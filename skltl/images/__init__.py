"""From whatever ``X`` is to batches of RGB pictures."""

from skltl.images._bad_images import BadImage, find_bad_images
from skltl.images._batches import Batch, iter_batches
from skltl.images._decode import is_tensor, tensor_to_array
from skltl.images._preprocessing import Preprocessing, normalise
from skltl.images._source import ImageSource, read_images

__all__ = [
    "BadImage",
    "Batch",
    "ImageSource",
    "Preprocessing",
    "find_bad_images",
    "is_tensor",
    "iter_batches",
    "normalise",
    "read_images",
    "tensor_to_array",
]
