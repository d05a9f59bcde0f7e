"""Decode a path, PIL image or array to an image of the channels that a network takes.

All readers return `Decoded`. That is either `Pixels`, an array (h, w, c), uint8 for
8 bits per channel, else float32 (16-bit images scaled to [0, 1], float arrays
unchanged); or a PIL image, which takes less time and memory. For three channels, RGB,
its mode is "RGB", "RGBA" with an opaque alpha channel, "L" (gray) or "F" (gray,
float32). For one channel it is always a PIL image, of mode "L" or "F", and for other
numbers always an array. An unreadable item raises ``ValueError`` with the reason; the
source adds its index and path.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeGuard
from weakref import WeakValueDictionary

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
    features,
)

from skltl._locks import Lock
from skltl.exceptions import shorten
from skltl.images._channels import RGB, channel_counts
from skltl.images._descriptions import describe_file, describe_text, is_heif
from skltl.images._memory import reserve_memory

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
Decoded: TypeAlias = Image.Image | Pixels

# Raster formats that Pillow decodes by itself. Without this list Pillow tries all its
# plug-ins, and an EPS file named .png would start Ghostscript. Importing a plug-in
# registers it in `Image.OPEN`.
_PLUGINS = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "BMP": BmpImagePlugin,
    "GIF": GifImagePlugin,
    "TIFF": TiffImagePlugin,
}
# From Pillow 11.3 on, where it is built with libavif.
if find_spec("PIL.AvifImagePlugin") and features.check("avif"):
    _PLUGINS["AVIF"] = import_module("PIL.AvifImagePlugin")
FILE_FORMATS = tuple(_PLUGINS)

# Memory per pixel of most decoders: the image in Pillow's memory.
PIXEL_BYTES = 4

# Memory limit of a decoder, per pixel of `Image.MAX_IMAGE_PIXELS`. WebP and progressive
# JPEG need more than the image: gigabytes for images below that limit.
DECODER_BYTES_PER_PIXEL = 6.5

# Peak memory per pixel of decoders that hold more than the image. libwebp holds two
# copies and Pillow makes two more; those of libavif and libheif were measured.
_LARGE_DECODERS = {"WEBP": 16, "AVIF": 10, "HEIF": 8}

# Peak memory per pixel of the conversion to RGB.
_CONVERSION_BYTES = 8

# Large images are converted strip by strip: converting a whole image makes copies that
# take many times its memory.
PIXELS_PER_STRIP = 2**20

# Transparent images are composited on white.
BACKGROUND = 255

# TIFF tags, and two of their values (TIFF 6.0, sections 3, 8 and 18).
BITS_PER_SAMPLE = 258
PHOTOMETRIC_INTERPRETATION = 262
WHITE_IS_ZERO = 0
EXTRA_SAMPLES = 338
ASSOCIATED_ALPHA = 1

# Modes whose bands are channels, by their number: alpha is one more channel here.
BAND_MODES = {2: ("LA",), 4: ("RGBA", "RGBX")}

# Weights of red, green and blue in gray (ITU-R BT.601), as in Pillow.
GRAY_WEIGHTS = (0.299, 0.587, 0.114)

SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}

# Transposition that undoes each EXIF orientation (CIPA DC-008, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Errors that Pillow's decoders raise on damaged files; they have no common base class.
DECODER_ERRORS = (
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
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # about odd metadata, where the user's filters turn warnings into errors
)


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    With `least_side`, a JPEG file may be decoded at a half, a quarter or an eighth of
    its size, as long as both sides have at least that many pixels. `value_range` are
    the values of black and white in images that do not have 8 bits per channel; values
    beyond are clipped. `page` is the frame of a file with several ones. `n_channels` is
    the number of channels that the network takes.
    """

    least_side: int | None = None
    value_range: tuple[float, float] | None = None
    page: int = 0
    n_channels: int = RGB


EXACT = Decoding()


def is_tensor(item: object) -> TypeGuard[Any]:
    """Return whether ``item`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.Tensor)


def tensor_to_array(tensor: Any) -> NDArray[Any]:
    """Convert a torch tensor on any device to a numpy array."""
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such dtype
            tensor = tensor.float()
        array: NDArray[Any] = tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the tensor cannot be converted to an array: {error}"
        ) from error
    return array


def read_file(path: str | os.PathLike[str], decoding: Decoding = EXACT) -> Decoded:
    """Decode a frame of an image file, upright."""
    check_regular_file(path)
    try:
        with Path(path).open("rb") as stream:
            return decode_stream(stream, decoding)
    except OSError as error:
        raise ValueError(reason_of(error)) from error


def decode_stream(stream: IO[bytes], decoding: Decoding = EXACT) -> Decoded:
    """Decode a frame of an image file from its beginning, upright."""
    try:
        return _convert(_load(stream, decoding), decoding, is_own=True)
    except DECODER_ERRORS as error:
        raise ValueError(reason_of(error)) from error


def read_image(image: Image.Image, decoding: Decoding = EXACT) -> Decoded:
    """Convert a PIL image to an upright one, or return it if it already is.

    The image is not changed. If Pillow has not loaded it yet, it is decoded from its
    file as in `read_file` and can still be loaded afterwards.
    """
    try:
        if _is_pending(image):
            return _read_pending(image, decoding)
        with lock_of(image):  # Pillow reads metadata and palettes lazily
            return _convert(image, decoding, is_own=False)
    except DECODER_ERRORS as error:
        raise ValueError(reason_of(error)) from error


def read_array(array: NDArray[Any], decoding: Decoding = EXACT) -> Decoded:
    """Convert an array (h, w) or (h, w, channels) to the channels of the network."""
    found = array.shape[2] if array.ndim == 3 else 1
    expected = channel_counts(decoding.n_channels)
    if found not in expected:
        *others, last = map(str, expected)
        counts = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"it has {found} channels; expected {counts}")
    if decoding.value_range not in (None, (0, 255)) and array.dtype == np.uint8:
        raise ValueError(
            f"value_range={decoding.value_range} is given, and its dtype is uint8, "
            "whose values of black and white are 0 and 255; convert it to another "
            "dtype, such as float, to scale it by value_range"
        )
    if len(expected) > 1 and found == 4 and decoding.value_range is not None:
        array = _with_scaled_colors(array, decoding.value_range)
        decoding = replace(decoding, value_range=None)
    pixels: NDArray[Any] = _with_known_range(array, decoding.value_range)
    if len(expected) == 1:
        return np.ascontiguousarray(pixels)
    if found == 1:
        gray = pixels.reshape(pixels.shape[:2])
        # numpy is faster for small images
        if decoding.n_channels == RGB and gray.size <= PIXELS_PER_STRIP:
            return np.repeat(gray[..., np.newaxis], 3, axis=2)
        return Image.fromarray(np.ascontiguousarray(gray))
    rgb = _array_on_white(pixels) if found == 4 else np.ascontiguousarray(pixels)
    return rgb if decoding.n_channels == RGB else _as_gray(rgb)


def _with_scaled_colors(
    rgba: NDArray[Any], value_range: tuple[float, float]
) -> NDArray[Any]:
    """Scale the colors of an array (h, w, 4); alpha has the range of its dtype."""
    if rgba.dtype == np.uint8 or rgba.dtype == np.bool_:
        return rgba
    alpha = _with_known_range(rgba[..., 3:], None)
    return np.concatenate([_scaled(rgba[..., :3], *value_range), alpha], axis=2)


def to_pixels(decoded: Decoded) -> Pixels:
    """Convert a PIL image to an RGB array (h, w, 3); return an array unchanged."""
    if not isinstance(decoded, Image.Image):
        return decoded
    dtype: Any = np.float32 if decoded.mode == "F" else np.uint8
    pixels: Pixels = np.empty((decoded.height, decoded.width, 3), dtype)
    for box, strip in zip(_boxes(decoded), iter_pixels(decoded), strict=True):
        pixels[box[1] : box[3]] = strip
    return pixels


def iter_pixels(decoded: Decoded) -> Iterator[Pixels]:
    """Yield the result of `to_pixels` strip by strip, from the top."""
    if not isinstance(decoded, Image.Image):
        yield decoded
        return
    for box in _boxes(decoded):
        yield _rgb_array(decoded.crop(box))


def _rgb_array(image: Image.Image) -> Pixels:
    """Convert a PIL image to an array (h, w, 3) at once."""
    values: Any = np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    is_gray = values.ndim == 2
    pixels: Pixels = np.repeat(values[..., np.newaxis], 3, 2) if is_gray else values
    return pixels


_locks: WeakValueDictionary[int, Lock] = WeakValueDictionary()
_locks_lock = Lock()


def lock_of(shared: object) -> Lock:
    """Return the lock of an object that only one thread may use at a time.

    It exists while a thread uses it, so its id cannot be that of another object.
    """
    with _locks_lock:
        lock = _locks.get(id(shared))
        if lock is None:
            lock = _locks[id(shared)] = Lock()
        return lock


def open_image(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Open an image file as ``Image.open`` does, but only in one of `FILE_FORMATS`."""
    stream.seek(0)
    head = stream.read(1024)
    for name in FILE_FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(head[:16]) is not True:
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # as in Pillow: another plug-in may accept the file
    if is_heif(head) and has_heif():
        stream.seek(0)
        return _open_heif(stream)
    raise UnidentifiedImageError(describe_file(head, FILE_FORMATS))


def has_heif() -> bool:
    """Return whether HEIC files can be decoded: by pillow-heif."""
    return find_spec("pillow_heif") is not None


def _open_heif(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Open a HEIC file, without making it a format of Pillow for other programs."""
    opened: ImageFile.ImageFile = import_module("pillow_heif").HeifImageFile(stream, "")
    return opened


def _load(
    stream: IO[bytes],
    decoding: Decoding,
    opened: ImageFile.ImageFile | None = None,
) -> Image.Image:
    """Decode a frame of an image file, or the state in which it was `opened`."""
    image = open_image(stream)
    check_size(image)
    if frame := decoding.page if opened is None else opened.tell():
        _seek(image, frame)
        check_size(image)
    if opened is not None and (image.mode, image.size) != (opened.mode, opened.size):
        image.draft(opened.mode, opened.size)  # the user called it, too
    n_pixels = image.width * image.height
    if decoding.least_side is not None:
        image.draft(None, (decoding.least_side,) * 2)
    bytes_per_pixel = _decoder_bytes(image)
    if bytes_per_pixel == PIXEL_BYTES:  # only the reduced image is held
        n_pixels = image.width * image.height
    reserve_memory(n_pixels, max(bytes_per_pixel, _CONVERSION_BYTES))
    image.load()  # before metadata is read, some of which follows the pixels
    return image


def _seek(image: ImageFile.ImageFile, page: int) -> None:
    """Go to a frame of a file that has several ones."""
    n_pages = getattr(image, "n_frames", 1)
    if page >= n_pages:
        raise ValueError(f"it has no page {page}; the last one is page {n_pages - 1}")
    image.seek(page)


def check_size(image: ImageFile.ImageFile) -> None:
    """Raise if the header announces an image that would take too much memory.

    Pillow only warns up to twice its limit, and a warning is no protection.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None:
        return
    n_pixels = image.width * image.height
    if n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels:,} pixels, more than the limit of {limit:,} "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        )
    n_bytes = _decoder_bytes(image)
    limit = int(limit * DECODER_BYTES_PER_PIXEL / n_bytes)
    if n_pixels > limit:
        is_large = image.format in _LARGE_DECODERS
        kind = {"WEBP": "WebP"}.get(str(image.format), str(image.format))
        kind = kind if is_large else "progressive JPEG"
        raise ValueError(
            f"it has {n_pixels:,} pixels, more than the limit of {limit:,} for this "
            f"kind of file (a {kind} file needs {n_bytes} bytes of memory per pixel); "
            "save it as PNG, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


def _decoder_bytes(image: ImageFile.ImageFile) -> int:
    """Return the memory per pixel that Pillow and its libraries need for decoding."""
    if image.format in _LARGE_DECODERS:
        return _LARGE_DECODERS[image.format]
    if "progressive" in image.info:
        # libjpeg holds the coefficients of the whole image, of 2 bytes each. `layer`
        # has the sampling factors of each component.
        layers = getattr(image, "layer", ())
        sizes = [int(across) * int(down) for _, across, down, _ in layers]
        return PIXEL_BYTES + math.ceil(2 * sum(sizes) / max([1, *sizes]))
    return PIXEL_BYTES


def _is_pending(image: Image.Image) -> TypeGuard[ImageFile.ImageFile]:
    """Return whether an image comes from ``Image.open`` and is not decoded yet."""
    # WebP has no tiles before it is decoded.
    return isinstance(image, ImageFile.ImageFile) and (
        bool(image.tile) or getattr(image, "_im", True) is None
    )


def _read_pending(image: ImageFile.ImageFile, decoding: Decoding) -> Decoded:
    """Decode the file of a PIL image that is not loaded yet."""
    if image.format not in (*FILE_FORMATS, "MPO"):  # MPO: several JPEG images
        raise ValueError(
            f"it is a {shorten(str(image.format), 20)} image that is not loaded yet, "
            f"and only {', '.join(FILE_FORMATS)} are decoded here; call its load() "
            "method first if you trust its origin"
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
            loaded = _load(stream, decoding, image)
        finally:
            stream.seek(position)
    return _convert(loaded, decoding, is_own=True)


def _convert(image: Image.Image, decoding: Decoding, is_own: bool) -> Decoded:
    """Convert a loaded image, which may be changed in place if it `is_own`."""
    if not image.width or not image.height:
        raise ValueError("it has no pixels")
    image.load()
    n_channels = decoding.n_channels
    if n_channels not in (1, RGB):
        return _bands(image, n_channels)
    converted = _upright_rgb(image, decoding, is_own)
    return converted if n_channels == RGB else _as_gray(converted)


def _bands(image: Image.Image, n_channels: int) -> Pixels:
    """Return the bands of an image, alpha included, as an array (h, w, n_channels)."""
    if getattr(image, "tag_v2", {}).get(EXTRA_SAMPLES) == (ASSOCIATED_ALPHA,):
        raise ValueError(
            "its colors are multiplied by its alpha channel (TIFF ExtraSamples 1), "
            "which Pillow undoes; store the channels as unspecified data"
        )
    if image.mode not in BAND_MODES.get(n_channels, ()):
        raise ValueError(
            f"its color mode is {image.mode}, and the network takes {n_channels} "
            "channels; a reader may read files with more bands than Pillow does"
        )
    return np.asarray(_upright(image))


def _as_gray(image: Decoded) -> Image.Image:
    """Convert an RGB image to gray."""
    if isinstance(image, Image.Image):
        return image if image.mode in ("L", "F") else image.convert("L")
    if image.dtype == np.uint8:
        return Image.fromarray(image).convert("L")
    return Image.fromarray(image @ np.array(GRAY_WEIGHTS, dtype=np.float32))


def _upright_rgb(image: Image.Image, decoding: Decoding, is_own: bool) -> Image.Image:
    """Convert a loaded image to upright RGB or gray."""
    if image.mode in (*SIXTEEN_BIT_MODES, "I", "F"):
        return _deep_gray(image, decoding.value_range)
    image = _upright(image)
    if image.mode == "P" and image.palette is None:  # later frames of a gray GIF
        return image.convert("L")
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(image, is_own)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation of an image.

    ``ImageOps.exif_transpose`` also rewrites the metadata, and fails on odd ones.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return image  # unreadable metadata, readable pixels
    if orientation in UPRIGHT:
        return image.transpose(UPRIGHT[orientation])
    return image


def _deep_gray(
    image: Image.Image, value_range: tuple[float, float] | None
) -> Image.Image:
    """Scale a gray image of more than 8 bits to [0, 1].

    ``convert("RGB")`` would clip it.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    is_sixteen_bit = image.mode in SIXTEEN_BIT_MODES
    n_bits = tags.get(BITS_PER_SAMPLE, (16,))[0] if is_sixteen_bit else 32
    if value_range is None and n_bits != 16:
        kind = {"I": "32-bit integers", "F": "floats"}.get(image.mode)
        kind = kind or f"integers of {n_bits} bits"
        raise ValueError(
            f"its pixels are {kind}, whose range is unknown; pass value_range=(black, "
            "white), the values of black and white"
        )
    # Not if the user has said which value is black, and which is white.
    is_inverted = value_range is None and (
        tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    )
    transparent = image.info.get("transparency")  # a single gray value
    image = _upright(image)
    page = Image.new("F", image.size)
    for box in _boxes(image):
        gray = np.asarray(image.crop(box))
        if is_sixteen_bit:
            gray = gray.astype(np.uint16)
            if is_inverted:
                gray = np.uint16(2**n_bits - 1) - gray
        pixels = _with_known_range(gray, value_range)
        if transparent is not None:
            pixels = np.where(gray == transparent, np.float32(1), pixels)
        page.paste(Image.fromarray(pixels), box)
    return page


def _with_known_range(
    array: NDArray[Any], value_range: tuple[float, float] | None
) -> Pixels:
    """Return uint8 or float32 pixels; refuse dtypes that do not define white."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if value_range is not None and array.dtype.kind in "iuf":
        return _scaled(array, *value_range)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return array.astype(np.float32) / np.float32(65535)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        with np.errstate(over="ignore"):  # becomes infinity
            pixels = array.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds NaN or infinity")
        return pixels
    raise ValueError(
        f"its dtype is {shorten(str(array.dtype), 60)}, which does not define black "
        "and white; pass uint8 (0 to 255), uint16 (0 to 65535), bool, floats in "
        "[0, 1], or value_range=(black, white)"
    )


def _scaled(array: NDArray[Any], black: float, white: float) -> NDArray[np.float32]:
    """Scale values between those of black and white to [0, 1], and clip the others."""
    with np.errstate(over="ignore"):  # becomes infinity
        pixels = array.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("it holds NaN or infinity")
    pixels -= np.float32(black)
    pixels /= np.float32(white - black)
    return np.clip(pixels, 0, 1, out=pixels)


def _on_white(image: Image.Image, is_own: bool) -> Image.Image:
    """Composite an image with transparent pixels on white, strip by strip."""
    mode = "L" if image.mode in ("L", "LA", "1") else "RGB"
    boxes = list(_boxes(image))
    # In a large image that may be changed, the result takes no memory of its own.
    is_reused = len(boxes) > 1 and is_own and image.mode in ("RGB", "RGBA")
    page = image if is_reused else Image.new(mode, image.size)
    for box in boxes:
        page.paste(_strip_on_white(image.crop(box), page.mode), box)
    return page


def _strip_on_white(strip: Image.Image, mode: str) -> Image.Image:
    """Composite a strip on white; its copies are freed before the next strip."""
    white = Image.new("RGBA", strip.size, (BACKGROUND,) * 4)
    return Image.alpha_composite(white, strip.convert("RGBA")).convert(mode)


def _array_on_white(rgba: Pixels) -> Decoded:
    """Composite an array (h, w, 4) on white."""
    if rgba.dtype == np.uint8:
        return _on_white(Image.fromarray(np.ascontiguousarray(rgba)), is_own=False)
    white = np.float32(BACKGROUND / 255)
    composite: NDArray[np.float32] = np.empty((*rgba.shape[:2], 3), np.float32)
    n_rows = max(1, PIXELS_PER_STRIP // rgba.shape[1])
    for top in range(0, len(rgba), n_rows):
        strip = rgba[top : top + n_rows]
        alpha = strip[:, :, 3:]
        composite[top : top + n_rows] = strip[:, :, :3] * alpha + white * (1 - alpha)
    return composite


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield the strips of an image, from the top, as Pillow's boxes."""
    width, height = image.size
    n_rows = max(1, PIXELS_PER_STRIP // width)
    for top in range(0, height, n_rows):
        yield 0, top, width, min(top + n_rows, height)


def reason_of(error: BaseException) -> str:
    """Return an error's message without the path, which the caller adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    message = shorten(" ".join(str(error).split()).rstrip("."), 300)
    return message or f"reading it failed ({type(error).__name__})"


def check_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise if a path is not a regular file: opening a FIFO or device can block."""
    if not os.fspath(path):
        raise ValueError("the path is empty")
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = describe_text(os.fspath(path)) or reason_of(error)
        raise ValueError(reason) from error
    if stat.S_ISDIR(mode):
        raise ValueError("it is a directory, not a file; pass the files in it")
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")
