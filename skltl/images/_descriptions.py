"""Strings that are no paths, and descriptions of files in other formats."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Base64 of the first bytes of JPEG, PNG, GIF, WebP (RIFF), TIFF in both byte orders.
_BASE64_PREFIXES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]{40,200}")
# Also of a chain of fsspec, "simplecache::s3://bucket/a.jpg".
_URL = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_GLOB_PATTERN = re.compile(r"[*?]|\[.+\]")


def is_url(text: str) -> bool:
    """Return whether a string begins with a protocol."""
    return _URL.match(text) is not None


def is_data_url(text: str) -> bool:
    """Return whether a string is a URL that holds its content."""
    return text[:5].lower() == "data:"


def describe_text(text: str) -> str | None:
    """Describe a string that is not a path; return ``None`` if it may be one."""
    if is_data_url(text):
        return "it is a data URL; put it in a list"
    if text.startswith(_BASE64_PREFIXES) and _BASE64.fullmatch(text[:200]):
        return "it is base64 text, not a path; pass base64.b64decode(text)"
    if is_url(text):
        return "it is a URL; put it in a list"
    if _GLOB_PATTERN.search(text):
        return "no such file exists; if it is a pattern, pass glob.glob(pattern)"
    return None


# First bytes of other files, with what to do about them.
_OTHER_FILES = (
    (b"%PDF-", "a PDF document; save its pages as PNG images"),
    (b"%!PS", "a PostScript (EPS) file; convert it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript (EPS) file; convert it to PNG"),
    (b"8BPS", "a Photoshop (PSD) file; export it as PNG"),
    (b"\0\0\1\0", "an icon (ICO) file; convert it to PNG"),
    (b"\0\0\2\0", "an icon (ICO) file; convert it to PNG"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 file; convert it to PNG"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file; convert it to PNG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL file; convert it to PNG or JPEG"),
    (b"\xff\x0a", "a JPEG XL file; convert it to PNG or JPEG"),
    (b"PK\3\4", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def describe_file(head: bytes, formats: Sequence[str]) -> str:
    """Describe a file in none of the supported formats, by its first bytes."""
    if not head:
        return "the file is empty"
    for prefix, kind in _OTHER_FILES:
        if head.startswith(prefix):
            return f"it is {kind}"
    if head.startswith((b"II*\0", b"MM\0*")):
        return (
            "it is a TIFF file of a kind that Pillow does not read, such as one of "
            "more than 4 channels; pass a reader for it"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!")):
        return "it is an SVG drawing; convert it to PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, possibly the response to a failed download"
    if head[4:8] == b"ftyp":
        return _describe_container(head)
    return f"it is not a {', '.join(formats[:-1])} or {formats[-1]} file"


def _describe_container(head: bytes) -> str:
    """Describe a file in the ISO base media format."""
    if _brands(head) & _AVIF_BRANDS:
        return "it is a damaged AVIF file, or Pillow has no decoder for it; convert it"
    if is_heif(head):
        return "it is a HEIC file; pip install pillow-heif, or convert it to JPEG"
    return "it is a video; save its frames as images"


def is_heif(head: bytes) -> bool:
    """Return whether the first bytes are of a HEIC file; AVIF is a similar format."""
    brands = _brands(head)
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS


def _brands(head: bytes) -> set[bytes]:
    """Return the brands of a file in the ISO base media format."""
    if head[4:8] != b"ftyp":
        return set()
    n_bytes = int.from_bytes(head[:4], "big")
    return {head[at : at + 4] for at in range(8, min(n_bytes, len(head)), 4)}
