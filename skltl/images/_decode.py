"""One path, PIL picture, array or tensor -> one RGB picture.

Every reader here returns `Decoded`. That is `Pixels`, an array (h, w, 3), uint8 when
the picture has 8 bits per channel, else float32 (16-bit pictures scaled to [0, 1],
float arrays as they are); or still Pillow's own picture, in mode RGB, since an array
and the way back for the resize take a sixth of the time. What cannot be read raises
``ValueError`` with the reason; the source adds which item.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
Decoded: TypeAlias = Image.Image | Pixels

# Raster formats that Pillow decodes by itself. Without this list Pillow tries every
# plug-in it has, and an EPS file named .png would start Ghostscript.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Transparent pixels are laid on white, as on a page.
BACKGROUND = 255

# TIFF's tags, and a value (TIFF 6.0, sections 3 and 8).
BITS_PER_SAMPLE = 258
PHOTOMETRIC_INTERPRETATION = 262
WHITE_IS_ZERO = 0

# What undoes each orientation of EXIF (CIPA DC-008, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}

# What Pillow's decoders were seen to raise on damaged files. They are one family for
# a user ("this file is damaged"), but Pillow has no common class for them.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    AssertionError,  # also of a picture whose file was closed
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # of odd metadata, where the user's filters make errors of warnings
)


def is_tensor(item: object) -> TypeGuard[Any]:
    """Tell whether ``item`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.Tensor)


def read_file(path: str | os.PathLike[str], least_side: int | None = None) -> Decoded:
    """Decode the first frame of a picture file, upright, as RGB.

    With `least_side`, a JPEG file may be decoded at a half, a quarter or an eighth of
    its size, as long as no side gets shorter than that.
    """
    _check_regular_file(path)
    try:
        with Image.open(path, formats=FILE_FORMATS) as picture:
            _check_pixel_count(picture)
            if least_side is not None:
                picture.draft(None, (least_side, least_side))
            return _read_picture(picture)
    except _DECODER_ERRORS as error:
        raise ValueError(_reason(error)) from error


def read_picture(picture: Image.Image) -> Decoded:
    """Turn a PIL picture into an upright RGB one, or return it if it is; see `Decoded`.

    The picture stays as it is.
    """
    try:
        return _read_picture(picture)
    except _DECODER_ERRORS as error:
        raise ValueError(_reason(error)) from error


def read_array(array: NDArray[Any]) -> Pixels:
    """Turn an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) into RGB."""
    pixels: NDArray[Any] = _with_known_range(array)
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    n_channels = pixels.shape[2]
    if n_channels == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    elif n_channels == 4:
        pixels = _on_background(pixels)
    elif n_channels != 3:
        raise ValueError(f"it has {n_channels} channels; 1, 3 or 4 are understood")
    return np.ascontiguousarray(pixels)


def to_pixels(decoded: Decoded) -> Pixels:
    """Bring Pillow's own picture to an array; arrays stay as they are."""
    return np.array(decoded) if isinstance(decoded, Image.Image) else decoded


def tensor_to_array(tensor: Any) -> NDArray[Any]:
    """Bring a torch tensor, on any device, to numpy."""
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type
            tensor = tensor.float()
        array: NDArray[Any] = tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"its tensor cannot become an array: {error}") from error
    return array


def _check_regular_file(path: str | os.PathLike[str]) -> None:
    # Opening a FIFO or a device can block for ever, so the kind is asked first.
    if not os.fspath(path):
        raise ValueError("the path is empty")
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ValueError(_reason(error)) from error
    if stat.S_ISDIR(mode):
        raise ValueError("it is a directory, not a file")
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")


def _check_pixel_count(picture: Image.Image) -> None:
    # Pillow only warns up to twice its limit. A warning is no protection.
    limit = Image.MAX_IMAGE_PIXELS
    n_pixels = picture.width * picture.height
    if limit is not None and n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels:,} pixels, more than the limit of {limit:,} "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        )


def _read_picture(picture: Image.Image) -> Decoded:
    if not picture.width or not picture.height:
        raise ValueError("it has no pixels")
    picture.load()  # before metadata is read: some lie behind the pixels
    if picture.mode in SIXTEEN_BIT_MODES:
        return _read_deep_grey(picture)
    picture = _upright(picture)
    if picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind}, whose range is unknown")
    if picture.has_transparency_data:
        return _on_background(np.asarray(picture.convert("RGBA")))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _read_deep_grey(picture: Image.Image) -> Pixels:
    """Scale a grey picture of 16 bits; ``convert("RGB")`` would clip it to white."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF file
    n_bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    if n_bits != 16:
        raise ValueError(f"its pixels have {n_bits} bits; 8 and 16 are understood")
    grey = np.asarray(_upright(picture)).astype(np.uint16)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        grey = np.uint16(65535) - grey
    if "transparency" in picture.info:  # the one value that is transparent
        grey = np.where(grey == picture.info["transparency"], np.uint16(65535), grey)
    return read_array(grey)


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its camera's orientation says.

    Not ``ImageOps.exif_transpose``, which also writes the metadata anew, and fails when
    any of it is odd.
    """
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except _DECODER_ERRORS:
        return picture  # a picture that can be seen, with metadata that cannot be read
    if orientation in UPRIGHT:
        return picture.transpose(UPRIGHT[orientation])
    return picture


def _with_known_range(array: NDArray[Any]) -> Pixels:
    """Return uint8 or float32 pixels; refuse types that do not say what white is."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return array.astype(np.float32) / np.float32(65535)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        pixels = array.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds NaN or infinity")
        return pixels
    raise ValueError(
        f"its dtype is {array.dtype}, which does not say what black and white are; "
        "pass uint8 (0 to 255), uint16 (0 to 65535), bool, or floats in [0, 1]"
    )


def _on_background(rgba: Pixels) -> Pixels:
    """Lay a picture with an alpha channel on the background."""
    if rgba.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(rgba))
        page = Image.new("RGBA", picture.size, (BACKGROUND,) * 3 + (255,))
        return np.array(Image.alpha_composite(page, picture).convert("RGB"))
    alpha = rgba[:, :, 3:]
    white = np.float32(BACKGROUND / 255)
    composite: NDArray[np.float32] = rgba[:, :, :3] * alpha + white * (1 - alpha)
    return composite.astype(np.float32)


def _reason(error: BaseException) -> str:
    """Say what went wrong without the path, which the caller adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a {', '.join(FILE_FORMATS[:-1])} or {FILE_FORMATS[-1]} file"
    return str(error).rstrip(".") or type(error).__name__
