"""Decoding of paths and files, and refusals of those that cannot be decoded."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from skltl.exceptions import ImageReadError
from skltl.images import read_images


def decoded(item):
    return read_images([item])[0]


class OwnPath(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, lambda path: np.str_(str(path)), OwnPath])
def test_paths_are_strings_or_path_like(images, image_files, kind):
    np.testing.assert_array_equal(decoded(kind(image_files[2])), images[2])


@pytest.mark.parametrize(
    "name", ["Blüte 花.png", "with space.png", "no_extension", "a[1]*.png"]
)
def test_files_may_have_any_name(image, tmp_path, name):
    image.save(tmp_path / name, "PNG")

    np.testing.assert_array_equal(decoded(tmp_path / name), image)


def test_links_are_followed(images, image_files, tmp_path):
    (tmp_path / "link").symlink_to(image_files[0])

    np.testing.assert_array_equal(decoded(tmp_path / "link"), images[0])


def missing(folder):
    return folder / "missing.png"


def directory(folder):
    return folder


def dangling_link(folder):
    (folder / "dangling").symlink_to(folder / "missing.png")
    return folder / "dangling"


def looping_link(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def device(_):
    return Path("/dev/zero")


def nul_byte(_):
    return "image\0.png"


def empty_path(_):
    return ""


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (missing, "no such file"),
        (directory, "directory"),
        (dangling_link, "no such file"),
        (looping_link, "symbolic link"),
        (fifo, "regular file"),
        (device, "regular file"),
        (nul_byte, "null byte"),
        (empty_path, "path is empty"),
    ],
)
def test_paths_that_are_no_files_are_named(image_files, tmp_path, path, reason):
    source = read_images([image_files[0], path(tmp_path)])

    with pytest.raises(ImageReadError, match=f"Image 1 .*{reason}"):
        source[1]


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("extension", [".jpg", ""])
def test_files_are_recognized_by_content(image, tmp_path, file_format, extension):
    path = tmp_path / f"image{extension}"
    options = {"lossless": True} if file_format == "WEBP" else {}
    image.save(path, format=file_format, **options)

    np.testing.assert_array_equal(decoded(path), image)


def test_jpeg_files_are_decoded_as_by_pillow(image, tmp_path):
    image.save(tmp_path / "image.jpg")

    by_hand = np.asarray(Image.open(tmp_path / "image.jpg").convert("RGB"))

    np.testing.assert_array_equal(decoded(tmp_path / "image.jpg"), by_hand)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_color_modes_are_converted_to_rgb(image, mode):
    converted = image.convert(mode)

    pixels = decoded(converted)

    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(converted.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_composited_on_white(mode):
    gray = Image.new("L", (4, 4), 100)
    half = Image.new("L", (4, 4), 128)
    layers = [gray] * (3 if mode == "RGBA" else 1)
    image = Image.merge(mode, [*layers, half])

    expected = 255 + (100 - 255) * 128 / 255

    np.testing.assert_allclose(decoded(image), expected, atol=1)


def test_the_transparent_color_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "image.gif", transparency=1)

    assert (decoded(tmp_path / "image.gif") == 255).all()


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path, extension):
    values = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(values).save(path)

    pixels = decoded(path)

    np.testing.assert_allclose(pixels[:, :, 1], values / 65535, rtol=1e-6)


def tiff(n_bits, photometric, content):
    """Return a gray TIFF file of 4 x 4 pixels by hand (little-endian, one strip)."""
    tags = [
        (256, 3, 4),
        (257, 3, 4),
        (258, 3, n_bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1),
        (278, 3, 4),
        (279, 4, len(content)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    header = b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return header + directory + struct.pack("<I", 0) + content


def test_sixteen_bit_tiff_files_may_store_white_as_zero(tmp_path):
    (tmp_path / "deep.tif").write_bytes(tiff(16, 0, b"\xff\xff" * 16))

    np.testing.assert_array_equal(decoded(tmp_path / "deep.tif"), 0)


def test_twelve_bits_are_refused(tmp_path):
    (tmp_path / "deep.tif").write_bytes(tiff(12, 1, b"\xff" * 24))

    with pytest.raises(ImageReadError, match="12 bits"):
        decoded(tmp_path / "deep.tif")


def test_sixteen_bit_files_and_arrays_give_the_same_pixels(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    Image.fromarray(values).save(tmp_path / "deep.png")

    np.testing.assert_array_equal(decoded(tmp_path / "deep.png"), decoded(values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)

    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))

    np.testing.assert_array_equal(decoded(tmp_path / "turned.png"), np.asarray(upright))
    assert (decoded(tmp_path / "turned.png").shape[0] == 48) == (orientation >= 5)


def test_an_image_with_odd_metadata_is_decoded(image, tmp_path):
    """The camera's maker as a fraction, which cannot be written again."""
    entries = struct.pack("<HHII", 0x10F, 5, 1, 38) + struct.pack(
        "<HHIHH", 0x112, 3, 1, 6, 0
    )
    directory = struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<II", 7, 2)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory
    image.save(tmp_path / "odd.png", exif=exif)

    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))

    np.testing.assert_array_equal(decoded(tmp_path / "odd.png"), expected)


def test_a_pil_image_whose_file_is_closed_is_named(image_files):
    with Image.open(image_files[0]) as closed:
        pass

    with pytest.raises(ImageReadError, match="Image 0 could not be read"):
        decoded(closed)


def test_the_transparent_value_of_sixteen_bit_gray_is_white(tmp_path):
    values = np.array([[0, 1000], [1000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=1000)

    pixels = decoded(tmp_path / "deep.png")[:, :, 0]

    np.testing.assert_array_equal(pixels, [[0, 1], [1, 1]])


def test_the_first_frame_of_an_animation_is_decoded(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])

    np.testing.assert_array_equal(decoded(tmp_path / "film.gif"), np.asarray(frames[0]))


def test_a_pil_image_is_not_changed(image):
    before = image.copy()

    decoded(image)

    assert image.mode == before.mode
    assert image.tobytes() == before.tobytes()


def eps(_):
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def svg(_):
    return b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def pdf(_):
    return b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"


def html(_):
    return b"<!DOCTYPE html><html><body>404</body></html>"


def photoshop(_):
    return b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(64)


def empty(_):
    return b""


def half_a_jpeg(image):
    return encoded(image, "JPEG")[:400]


def half_a_png(image):
    content = encoded(image, "PNG")
    return content[: len(content) // 2]


def png_with_a_wrong_checksum(image):
    content = bytearray(encoded(image, "PNG"))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def float_tiff(_):
    return encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")


def encoded(image, file_format):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        *(eps, svg, pdf, html, photoshop, empty, half_a_jpeg, half_a_png),
        *(png_with_a_wrong_checksum, float_tiff),
    ],
)
def test_unreadable_files_are_named(image, tmp_path, content):
    path = tmp_path / "image.jpg"
    path.write_bytes(content(image))

    with pytest.raises(ImageReadError, match=r"image\.jpg.* could not be read") as info:
        read_images([image, path])[1]

    assert info.value.index == 1
    assert info.value.path == str(path)
    assert info.value.__cause__ is not None


def test_eps_files_start_no_program(tmp_path, monkeypatch):
    (tmp_path / "image.png").write_bytes(eps(None))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(ImageReadError):
        decoded(tmp_path / "image.png")

    assert not (tmp_path / "started").exists()


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 12_000, 10_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(12_001), 9)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
    (tmp_path / "bomb.png").write_bytes(content)

    with pytest.raises(ImageReadError, match="exceeds limit|more than the limit"):
        decoded(tmp_path / "bomb.png")


def pixels_or_error(path):
    """Return what a file decodes to, or the error."""
    try:
        return decoded(path)
    except ImageReadError as error:
        return error


def test_damaged_files_decode_or_are_named(image, tmp_path):
    path = tmp_path / "damaged"
    n_errors = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        file_format = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"][seed % 6]
        content = np.frombuffer(encoded(image, file_format), np.uint8).copy()
        content[rng.integers(len(content), size=20)] = rng.integers(256, size=20)
        path.write_bytes(content.tobytes()[: rng.integers(20, len(content) + 1)])

        found = pixels_or_error(path)

        if isinstance(found, ImageReadError):
            assert found.path == str(path)
            n_errors += 1
        else:
            assert found.shape[2] == 3
    assert n_errors > 20
