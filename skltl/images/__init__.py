"""Read ``X`` and turn it into batches of RGB images.

Programs that only run exported models use this package without scikit-learn and torch:
the modules that need scikit-learn are imported when their functions are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skltl.images._batches import (
    Batch,
    Crop,
    iter_batches,
    iter_crops,
    prefetch,
)
from skltl.images._containers import check_not_masked
from skltl.images._crops import crop_images, decode_crops
from skltl.images._decode import is_tensor, tensor_to_array
from skltl.images._fatal import check_not_fatal
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

if TYPE_CHECKING:
    from skltl.images._check import bad_images, drop_bad, find_bad_images
    from skltl.images._folder import load_image_folder

_NEED_SKLEARN = {
    "bad_images": "_check",
    "drop_bad": "_check",
    "find_bad_images": "_check",
    "load_image_folder": "_folder",
}

__all__ = [
    "FILE_STATE_BYTES",
    "MODES",
    "Batch",
    "Crop",
    "ImageSource",
    "JoinedSource",
    "PartOfSource",
    "PixelRanges",
    "Preprocessing",
    "as_float",
    "bad_images",
    "check_not_fatal",
    "check_not_masked",
    "check_reader",
    "check_value_range",
    "content_key",
    "crop_images",
    "decode_crops",
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


def __getattr__(name: str) -> Any:
    if name in _NEED_SKLEARN:
        return getattr(import_module(f"skltl.images.{_NEED_SKLEARN[name]}"), name)
    raise AttributeError(f"module 'skltl.images' has no attribute {name!r}")
