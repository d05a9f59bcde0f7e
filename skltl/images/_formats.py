"""Image files: which formats are opened, and how, and what other files are."""

from __future__ import annotations

import math
import struct
from typing import IO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

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
