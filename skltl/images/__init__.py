"""Read ``X`` and turn it into batches of RGB images."""

from skltl.images._batches import (
    Batch,
    Crop,
    ImageError,
    iter_batches,
    iter_crops,
    prefetch,
)
from skltl.images._check import bad_images, drop_bad, find_bad_images
from skltl.images._containers import check_not_masked
from skltl.images._decode import is_tensor, tensor_to_array
from skltl.images._folder import load_image_folder
from skltl.images._identity import (
    FILE_STATE_BYTES,
    content_key,
    file_digest,
    file_identity,
    file_state,
)
from skltl.images._preprocessing import MODES, Preprocessing, as_float, normalize
from skltl.images._ranges import PixelRanges
from skltl.images._source import (
    ImageSource,
    JoinedSource,
    PartOfSource,
    check_reader,
    check_value_range,
    read_images,
)

__all__ = [
    "FILE_STATE_BYTES",
    "MODES",
    "Batch",
    "Crop",
    "ImageError",
    "ImageSource",
    "JoinedSource",
    "PartOfSource",
    "PixelRanges",
    "Preprocessing",
    "as_float",
    "bad_images",
    "check_not_masked",
    "check_reader",
    "check_value_range",
    "content_key",
    "drop_bad",
    "file_digest",
    "file_identity",
    "file_state",
    "find_bad_images",
    "is_tensor",
    "iter_batches",
    "iter_crops",
    "load_image_folder",
    "normalize",
    "prefetch",
    "read_images",
    "tensor_to_array",
]
