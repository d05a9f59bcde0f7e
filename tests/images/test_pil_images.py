"""PIL images that are not loaded yet are decoded like files, and not changed."""

import io
import os
import threading

import numpy as np
import PIL
import pytest
from PIL import Image

from skltl.exceptions import ImageReadError
from skltl.images import Preprocessing, iter_crops, read_images


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer


def opened(image, file_format, **options):
    return Image.open(encoded(image, file_format, **options))


def test_eps_images_start_no_program(tmp_path, monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(ImageReadError, match=r"Image 0 .*EPS image.*load\(\)"):
        read_images([Image.open(io.BytesIO(eps))])[0]

    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("file_format", ["PPM", "TGA"])
def test_formats_that_are_refused_as_files_are_refused(image, file_format):
    lazy = opened(image, file_format)

    with pytest.raises(ImageReadError, match="not loaded yet.*JPEG, PNG"):
        read_images([lazy])[0]


def test_a_loaded_image_may_have_any_format(image):
    loaded = opened(image, "PPM")
    loaded.load()

    np.testing.assert_array_equal(read_images([loaded])[0], np.asarray(image))


def test_the_limit_on_pixels_is_that_of_files(image, tmp_path, monkeypatch):
    image.save(tmp_path / "image.png")
    lazy = opened(image, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1919)
    messages = []

    for item in (lazy, tmp_path / "image.png"):
        with pytest.raises(ImageReadError) as info:
            read_images([item])[0]
        messages.append(info.value.reason)

    assert messages[0] == messages[1]
    assert "1,920 pixels, more than the limit of 1,919" in messages[0]


@pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="its crop has the limit, too"
)
def test_a_loaded_image_has_no_limit_on_pixels(image, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    np.testing.assert_array_equal(read_images([image])[0], np.asarray(image))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("least_side", [None, 8])
def test_the_users_image_is_not_changed(image, file_format, least_side):
    lazy = opened(image, file_format)
    before = lazy.mode, lazy.size, dict(lazy.info), lazy.fp.tell()
    source = read_images([lazy])
    source.least_side = least_side

    source[0]

    assert (lazy.mode, lazy.size, dict(lazy.info), lazy.fp.tell()) == before
    by_hand = opened(image, file_format).convert("RGB")
    np.testing.assert_array_equal(np.asarray(lazy.convert("RGB")), np.asarray(by_hand))


def test_reduced_decoding_is_that_of_files(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((800, 600))
    large.save(tmp_path / "large.jpg")
    lazy = opened(large, "JPEG")

    from_memory = read_images([lazy]).reduced_to(70)[0]
    from_file = read_images([tmp_path / "large.jpg"]).reduced_to(70)[0]

    assert from_memory.shape == (75, 100, 3)
    np.testing.assert_array_equal(from_memory, from_file)


def test_an_image_may_be_read_repeatedly(image):
    lazy = opened(image, "PNG")
    source = read_images([lazy, lazy])

    for _ in range(2):
        for pixels in source:
            np.testing.assert_array_equal(pixels, np.asarray(image))


def test_a_damaged_image_is_an_error_each_time(image):
    """Pillow regards an image as loaded after decoding it has failed."""
    content = bytearray(encoded(image, "PNG").getvalue())
    content[len(content) // 2] ^= 0xFF
    source = read_images([Image.open(io.BytesIO(content))])

    for _ in range(3):
        with pytest.raises(ImageReadError, match="Image 0 could not be read"):
            source[0]


def test_the_current_frame_is_read():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    lazy = opened(frames[0], "GIF", save_all=True, append_images=frames[1:])
    lazy.seek(1)

    assert (read_images([lazy])[0] == (0, 0, 255)).all()
    assert lazy.tell() == 1


def test_draft_mode_set_by_the_user_is_kept(image):
    large = image.resize((480, 400))
    lazy = opened(large, "JPEG")
    lazy.draft("L", (120, 100))

    pixels = read_images([lazy])[0]

    by_hand = opened(large, "JPEG")
    by_hand.draft("L", (120, 100))
    np.testing.assert_array_equal(pixels[:, :, 1], np.asarray(by_hand))


@pytest.mark.parametrize(
    "close", [lambda lazy: lazy.close(), lambda lazy: lazy.fp.close()]
)
def test_a_closed_file_is_named(image, close):
    lazy = opened(image, "PNG")
    close(lazy)

    with pytest.raises(ImageReadError, match=r"closed before.*load\(\)"):
        read_images([image, lazy])[1]


class MeetingPlace(io.BytesIO):
    """A file whose reader waits, if it has a barrier, for the readers of others."""

    barrier = None

    def read(self, *size):
        if self.barrier is not None:
            barrier, self.barrier = self.barrier, None
            barrier.wait(timeout=20)
        return super().read(*size)


def test_images_are_decoded_in_parallel(images):
    files = []
    for image in images[:3]:
        content = encoded(Image.fromarray(image), "PNG").getvalue()
        files.append(MeetingPlace(content))
    lazy = [Image.open(file) for file in files]
    barrier = threading.Barrier(3)
    for file in files:
        file.barrier = barrier

    crops = list(iter_crops(read_images(lazy), range(3), Preprocessing(40), 3, 3))

    for crop, image in zip(crops, images, strict=False):
        np.testing.assert_array_equal(crop.pixels, image[:, 4:44])


def test_two_images_may_share_one_file(image):
    """Their threads must not move each other's position in it."""
    buffer = encoded(image, "PNG")
    lazy = [Image.open(buffer) for _ in range(40)]

    crops = list(iter_crops(read_images(lazy), range(40), Preprocessing(40), 40, 8))

    for crop in crops:
        np.testing.assert_array_equal(crop.pixels, np.asarray(image)[:, 4:44])


@pytest.mark.parametrize("is_loaded", [False, True], ids=["pending", "loaded"])
@pytest.mark.parametrize("frame", [0, 1, 2])
def test_every_frame_of_a_gray_animation_is_read(frame, is_loaded):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, size=(3, 40, 40), dtype=np.uint8)
    first, *others = map(Image.fromarray, frames)
    options = {"save_all": True, "append_images": others, "duration": 50}
    animation = opened(first, "GIF", **options)
    animation.seek(frame)
    if is_loaded:
        animation.load()

    found = read_images([animation])[0]

    again = opened(first, "GIF", **options)
    again.seek(frame)
    np.testing.assert_array_equal(found, again.convert("RGB"))
    np.testing.assert_allclose(found[..., 0], frames[frame], atol=2)


def test_gray_images_with_premultiplied_alpha_are_read(image):
    plain = image.convert("LA")
    plain.putalpha(128)

    found, expected = read_images([plain.convert("La"), plain])

    np.testing.assert_allclose(found, expected, atol=1)


def test_an_image_may_occur_many_times(image_files, images):
    with Image.open(image_files[0]) as lazy:
        source = read_images([lazy] * 60)
        crops = list(iter_crops(source, range(60), Preprocessing(40), 60, n_threads=8))

    assert len(crops) == 60
    for crop in crops:
        np.testing.assert_array_equal(crop.pixels, images[0][:, 4:44])


def test_an_image_may_be_in_many_sources(image_files, images):
    lazy = [Image.open(path) for path in image_files]
    barrier = threading.Barrier(4)
    found = []

    def read_all():
        barrier.wait()
        found.append([pixels.copy() for pixels in read_images(lazy)])

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image in lazy:
        image.close()

    assert len(found) == 4
    for read in found:
        np.testing.assert_array_equal(read, images)
