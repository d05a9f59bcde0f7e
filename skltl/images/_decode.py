"""Decode a path, PIL image or array to one RGB image.

Only files of `FILE_FORMATS` are opened. Every reader here returns `Decoded`. That is
`Pixels`, an array (h, w, 3), uint8 when the image has 8 bits per channel, else float32
(16-bit images scaled to [0, 1], float arrays unchanged); or still Pillow's own image,
which saves time and memory. Its mode is "RGB", "RGBA" with an alpha channel that is
opaque everywhere, "L" (grey), or "F" (grey, float32). What cannot be read raises
``ValueError`` with the reason; the source adds which item.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from skltl.exceptions import shorten
from skltl.images._refusals import what_the_text_is
from skltl.images._sharing import lock_of, wait_for_memory

# Raster formats that Pillow decodes by itself. Without this list Pillow tries every
# plug-in it has, and an EPS file named .png would start Ghostscript.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Importing them registers them in `Image.OPEN`.
_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# What is opened as one of them, but says another name: several JPEG images in one file.
_FORMAT_NAMES = {*FILE_FORMATS, "MPO"}

# What most decoders need for each pixel: the image in Pillow's memory.
PIXEL_BYTES = 4

# How much memory a decoder may take. Those of WebP and of progressive JPEG, which need
# more than the image, could take gigabytes below the limit for pixels.
DECODER_BYTES_PER_PIXEL = 6.5

# libwebp holds two copies while Pillow makes two more, of 4 bytes a pixel.
_WEBP_BYTES = 16

_HEAD_BYTES = 1024

# By first bytes: what a file is, and what to do.
_OTHER_FILES = (
    ((b"%PDF-",), "a PDF document; save its pages as PNG images"),
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), "a PostScript (EPS) file; convert it to PNG"),
    ((b"8BPS",), "a Photoshop (PSD) file; export it as PNG"),
    ((b"\0\0\1\0", b"\0\0\2\0"), "an icon (ICO) file; convert it to PNG"),
    (
        (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
        "a JPEG 2000 file; convert it to PNG",
    ),
    (
        (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"),
        "a JPEG XL file; convert it to PNG or JPEG",
    ),
    ((b"PK\3\4",), "a ZIP archive; unpack it"),
    ((b"\x1f\x8b",), "a gzip archive; unpack it"),
    ((b"version https://git-lfs",), "a Git LFS pointer; run `git lfs pull`"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def is_readable(format_name: str | None) -> bool:
    """Tell whether files of this format, as Pillow names it, are decoded."""
    return format_name in _FORMAT_NAMES


def open_image(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Open an image file as ``Image.open`` does; nothing is decoded yet.

    Only as one of `FILE_FORMATS`, and without Pillow's warning about many pixels, which
    is no protection: see `check_size`.
    """
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    for name in FILE_FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(head[:16]) is not True:
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # as Pillow does: another plug-in may know better
    raise UnidentifiedImageError(_what_it_is(head))


def check_size(image: ImageFile.ImageFile) -> None:
    """Refuse an image that would take too much memory, by its header."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None:
        return
    n_pixels = image.width * image.height
    if n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels:,} pixels, more than the limit of {limit:,} "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        )
    limit = int(limit * DECODER_BYTES_PER_PIXEL / decoder_bytes(image))
    if n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels:,} pixels, more than the limit of {limit:,} for files "
            f"like this one (a {_kind(image)} file needs {decoder_bytes(image)} bytes "
            "of memory per pixel); save it as PNG, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


def decoder_bytes(image: ImageFile.ImageFile) -> int:
    """Count the bytes for each pixel that Pillow and its libraries need to decode."""
    if image.format == "WEBP":
        return _WEBP_BYTES
    if "progressive" in image.info:
        # libjpeg holds the coefficients of the whole image, of 2 bytes each. `layer`
        # has, for each colour, how many there are beside those of the others.
        layers = getattr(image, "layer", ())
        sizes = [int(across) * int(down) for _, across, down, _ in layers]
        return PIXEL_BYTES + math.ceil(2 * sum(sizes) / max([1, *sizes]))
    return PIXEL_BYTES


def _kind(image: ImageFile.ImageFile) -> str:
    return "WebP" if image.format == "WEBP" else "progressive JPEG"


def _what_it_is(head: bytes) -> str:
    """Say what a file is that is not in one of the formats, by its first bytes."""
    if not head:
        return "the file is empty"
    for beginnings, what in _OTHER_FILES:
        if head.startswith(beginnings):
            return f"it is {what}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!")):
        return "it is an SVG drawing; convert it to PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, perhaps the answer to a failed download"
    return _what_container(head) or (
        f"it is not a {', '.join(FILE_FORMATS[:-1])} or {FILE_FORMATS[-1]} file"
    )


def _what_container(head: bytes) -> str | None:
    """Name a file of the ISO base media format (HEIC, AVIF, MP4)."""
    if head[4:8] != b"ftyp":
        return None
    n_bytes = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in range(8, min(n_bytes, len(head)), 4)}
    if brands & {b"avif", b"avis"}:
        return "it is an AVIF file; convert it to PNG or JPEG"
    if brands & _HEIF_BRANDS:
        return "it is a HEIC file; convert it to JPEG, for instance with pillow-heif"
    return "it is a video; save its frames as images"


Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
Decoded: TypeAlias = Image.Image | Pixels

# Transparent pixels are laid on white, as on a page.
BACKGROUND = 255

# Large images are converted by strips: a whole copy in each mode on the way would take
# many times the memory of the image.
PIXELS_A_STRIP = 2**20

# The most that converting takes, where decoding does not take more.
_CONVERSION_BYTES = 8

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
    AssertionError,
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
    """Decode the first frame of an image file, upright, as RGB.

    With `least_side`, a JPEG file may be decoded at a half, a quarter or an eighth of
    its size, as long as no side gets shorter than that.
    """
    _check_regular_file(path)
    try:
        with Path(path).open("rb") as stream:
            return _upright_rgb(_loaded(stream, least_side), is_own=True)
    except _DECODER_ERRORS as error:
        raise ValueError(_reason(error)) from error


def read_image(image: Image.Image, least_side: int | None = None) -> Decoded:
    """Turn a PIL image into an upright RGB one, or return it if it is; see `Decoded`.

    The image stays as it is: what Pillow has not loaded yet is decoded from its file as
    in `read_file`, and the image can still be loaded afterwards.
    """
    try:
        if _is_pending(image):
            return _read_pending(image, least_side)
        with lock_of(image):  # Pillow reads metadata and palettes when they are needed
            return _upright_rgb(image, is_own=False)
    except _DECODER_ERRORS as error:
        raise ValueError(_reason(error)) from error


def read_array(array: NDArray[Any]) -> Decoded:
    """Turn an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) into RGB."""
    pixels: NDArray[Any] = _with_known_range(array)
    n_channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if n_channels == 1:
        grey = pixels.reshape(pixels.shape[:2])
        if grey.size <= PIXELS_A_STRIP:  # for small ones Pillow takes longer than numpy
            return np.repeat(grey[..., np.newaxis], 3, axis=2)
        return Image.fromarray(np.ascontiguousarray(grey))
    if n_channels == 4:
        return _array_on_white(pixels)
    if n_channels != 3:
        raise ValueError(f"it has {n_channels} channels; 1, 3 or 4 are understood")
    return np.ascontiguousarray(pixels)


def to_pixels(decoded: Decoded) -> Pixels:
    """Bring Pillow's own image to an array (h, w, 3); arrays stay as they are."""
    if not isinstance(decoded, Image.Image):
        return decoded
    strips = list(_boxes(decoded))
    if len(strips) == 1:
        return _rgb_array(decoded)
    dtype: Any = np.float32 if decoded.mode == "F" else np.uint8
    pixels: Pixels = np.empty((decoded.height, decoded.width, 3), dtype)
    for box in strips:
        pixels[box[1] : box[3]] = _rgb_array(decoded.crop(box))
    return pixels


def iter_pixels(decoded: Decoded) -> Iterator[Pixels]:
    """Yield the rows of what `to_pixels` would return, some at a time."""
    if not isinstance(decoded, Image.Image):
        yield decoded
        return
    for box in _boxes(decoded):
        yield _rgb_array(decoded.crop(box))


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
        reason = what_the_text_is(os.fspath(path)) or _reason(error)
        raise ValueError(reason) from error
    if stat.S_ISDIR(mode):
        raise ValueError("it is a directory, not a file; pass the files in it")
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")


def _loaded(
    stream: IO[bytes],
    least_side: int | None,
    opened: ImageFile.ImageFile | None = None,
) -> Image.Image:
    """Decode an image file, or the frame of it that the user has opened."""
    image = open_image(stream)
    check_size(image)
    if opened is not None and (frame := opened.tell()):
        image.seek(frame)
        check_size(image)
    if opened is not None and (image.mode, image.size) != (opened.mode, opened.size):
        image.draft(opened.mode, opened.size)  # as the user did
    n_pixels = image.width * image.height
    if least_side is not None:
        image.draft(None, (least_side, least_side))
    bytes_per_pixel = decoder_bytes(image)
    if bytes_per_pixel == PIXEL_BYTES:  # nothing is held of the pixels left out
        n_pixels = image.width * image.height
    wait_for_memory(n_pixels, max(bytes_per_pixel, _CONVERSION_BYTES))
    image.load()  # before metadata is read: some lie behind the pixels
    return image


def _is_pending(image: Image.Image) -> TypeGuard[ImageFile.ImageFile]:
    """Tell whether Pillow has yet to decode an image, by ``Image.open``."""
    # WebP has no tiles before it is decoded.
    return isinstance(image, ImageFile.ImageFile) and (
        bool(image.tile) or getattr(image, "_im", True) is None
    )


def _read_pending(image: ImageFile.ImageFile, least_side: int | None) -> Decoded:
    if not is_readable(image.format):
        raise ValueError(
            f"it is a {shorten(str(image.format), 20)} image that is not loaded yet, "
            f"and only {', '.join(FILE_FORMATS)} are decoded here; call its load() "
            "before if you trust where it is from"
        )
    stream = getattr(image, "fp", None)
    if stream is None or getattr(stream, "closed", False):
        raise ValueError(
            "its file was closed before it was loaded; keep the file open, or call "
            "load() before closing it"
        )
    with lock_of(stream):
        position = stream.tell()
        try:
            loaded = _loaded(stream, least_side, image)
        finally:
            stream.seek(position)
    return _upright_rgb(loaded, is_own=True)


def _upright_rgb(image: Image.Image, is_own: bool) -> Decoded:
    """Convert a loaded image; one's own may be changed in place."""
    if not image.width or not image.height:
        raise ValueError("it has no pixels")
    image.load()
    if image.mode in SIXTEEN_BIT_MODES:
        return _deep_grey(image)
    image = _upright(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind}, whose range is unknown")
    if image.mode == "P" and image.palette is None:  # later frames of a grey GIF
        return image.convert("L")
    if image.mode == "La":  # Pillow knows no other way
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(image, is_own)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16 bits; ``convert("RGB")`` would clip it to white."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    n_bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    if n_bits != 16:
        raise ValueError(f"its pixels have {n_bits} bits; 8 and 16 are understood")
    is_inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    transparent = image.info.get("transparency")  # the one value that is
    image = _upright(image)
    page = Image.new("F", image.size)
    for box in _boxes(image):
        grey = np.asarray(image.crop(box)).astype(np.uint16)
        if is_inverted:
            grey = np.uint16(65535) - grey
        if transparent is not None:
            grey = np.where(grey == transparent, np.uint16(65535), grey)
        page.paste(Image.fromarray(_with_known_range(grey)), box)
    return page


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its camera's orientation says.

    Not ``ImageOps.exif_transpose``, which also writes the metadata anew, and fails when
    any of it is odd.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODER_ERRORS:
        return image  # an image that can be seen, with metadata that cannot be read
    if orientation in UPRIGHT:
        return image.transpose(UPRIGHT[orientation])
    return image


def _with_known_range(array: NDArray[Any]) -> Pixels:
    """Return uint8 or float32 pixels; refuse types that do not say what white is."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return array.astype(np.float32) / np.float32(65535)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        with np.errstate(over="ignore"):  # becomes infinity
            pixels = array.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds NaN or infinity")
        return pixels
    raise ValueError(
        f"its dtype is {shorten(str(array.dtype), 60)}, which does not say what black "
        "and white are; pass uint8 (0 to 255), uint16 (0 to 65535), bool, or floats in "
        "[0, 1]"
    )


def _on_white(image: Image.Image, is_own: bool) -> Image.Image:
    """Lay an image with transparent pixels on the background."""
    is_grey = image.mode in ("L", "LA", "1")
    boxes = list(_boxes(image))
    if len(boxes) == 1:
        return _strip_on_white(image, "L" if is_grey else "RGB")
    if is_own and image.mode in ("RGB", "RGBA"):
        page = image
    else:
        page = Image.new("L" if is_grey else "RGB", image.size)
    for box in boxes:
        page.paste(_strip_on_white(image.crop(box), page.mode), box)
    return page


def _strip_on_white(strip: Image.Image, mode: str) -> Image.Image:
    white = Image.new("RGBA", strip.size, (BACKGROUND,) * 3 + (255,))
    laid = Image.alpha_composite(white, strip.convert("RGBA"))
    return laid if mode == "RGBA" else laid.convert(mode)


def _array_on_white(rgba: Pixels) -> Decoded:
    if rgba.dtype == np.uint8:
        return _on_white(Image.fromarray(np.ascontiguousarray(rgba)), is_own=False)
    white = np.float32(BACKGROUND / 255)
    composite: NDArray[np.float32] = np.empty((*rgba.shape[:2], 3), np.float32)
    n_rows = max(1, PIXELS_A_STRIP // rgba.shape[1])
    for top in range(0, len(rgba), n_rows):
        strip = rgba[top : top + n_rows]
        alpha = strip[:, :, 3:]
        composite[top : top + n_rows] = strip[:, :, :3] * alpha + white * (1 - alpha)
    return composite


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield the strips of an image, from the top, as Pillow's boxes."""
    width, height = image.size
    n_rows = max(1, PIXELS_A_STRIP // width)
    for top in range(0, height, n_rows):
        yield 0, top, width, min(top + n_rows, height)


def _rgb_array(image: Image.Image) -> Pixels:
    values: Any = np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    is_grey = values.ndim == 2
    pixels: Pixels = np.repeat(values[..., np.newaxis], 3, 2) if is_grey else values
    return pixels


def _reason(error: BaseException) -> str:
    """Say what went wrong without the path, which the caller adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    said = shorten(str(error).rstrip("."), 300)
    return said or f"Pillow's decoder failed ({type(error).__name__})"
