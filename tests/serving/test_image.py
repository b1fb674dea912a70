import struct
import zlib

import numpy as np
import pytest
from media import write_face
from PIL import Image

from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import load_image, reference_pixels


def halves(path, colours, size=(200, 100), vertical=False, **kwargs):
    """A picture of two colours side by side (or one above the other)."""
    pixels = np.zeros((size[1], size[0], len(colours[0])), np.uint8)
    pixels[:] = colours[0]
    if vertical:
        pixels[size[1] // 2 :] = colours[1]
    else:
        pixels[:, size[0] // 2 :] = colours[1]
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def test_the_middle_square_is_used(tmp_path):
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = (10, 200, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = reference_pixels(load_image(tmp_path / "a.png"), 256, 256)
    assert got.shape == (256, 256, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[9:-9, 9:-9], np.broadcast_to([10, 200, 30], (238, 238, 3)))


def test_a_square_of_the_right_size_is_not_touched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(reference_pixels(load_image(tmp_path / "a.png"), 256, 256), pixels)


@pytest.mark.parametrize(
    "model, picture, rows, columns",
    [
        ((96, 160), (96, 400), (0, 96), (120, 280)),  # wider than the model's 3:5: sides go
        ((96, 160), (300, 160), (102, 198), (0, 160)),  # tall: top and bottom go
        ((96, 160), (160, 160), (32, 128), (0, 160)),  # a square loses the same above and below
        ((160, 96), (160, 400), (0, 160), (152, 248)),
        ((160, 96), (300, 96), (70, 230), (0, 96)),
        ((160, 96), (160, 160), (0, 160), (32, 128)),
        ((128, 128), (128, 300), (0, 128), (86, 214)),
    ],
)
def test_the_largest_middle_part_of_the_models_shape_is_used(model, picture, rows, columns):
    """Pictures whose cut-out has the model's own number of pixels: not one of them may change."""
    pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    got = reference_pixels(Image.fromarray(pixels), *model)
    np.testing.assert_array_equal(got, pixels[slice(*rows), slice(*columns)])


def test_the_cut_out_is_resized_without_distortion():
    """A 3:5 model and a picture of 800x800: rows 160 to 640 are used, and what is square in them stays square."""
    pixels = np.zeros((800, 800, 3), np.uint8)
    pixels[:160] = pixels[640:] = (255, 0, 0)  # outside
    pixels[350:450, 350:450] = 255  # a fifth of the model's size: 20 pixels each way around its middle
    got = reference_pixels(Image.fromarray(pixels), 96, 160)
    assert got.shape == (96, 160, 3)
    expected = np.zeros((96, 160), bool)
    expected[38:58, 70:90] = True
    np.testing.assert_array_equal(got[..., 1] > 127, expected)
    assert got[2:-2, ..., 0][~expected[2:-2]].max() < 128 and (got[[0, -1]] < 40).all(), "nothing of what is outside"


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    red, blue = (200, 0, 0), (0, 0, 200)
    halves(tmp_path / "a.png", [red, blue], size=(128, 128), exif=exif)
    got = reference_pixels(load_image(tmp_path / "a.png"), 128, 128)
    np.testing.assert_array_equal(got[10, 64], red)  # left becomes top
    np.testing.assert_array_equal(got[-10, 64], blue)


def test_transparency_shows_neutral_grey(tmp_path):
    halves(tmp_path / "a.png", [(200, 100, 0, 255), (200, 100, 0, 0)], size=(128, 128))
    got = reference_pixels(load_image(tmp_path / "a.png"), 128, 128)
    np.testing.assert_array_equal(got[64, 10], (200, 100, 0))
    np.testing.assert_array_equal(got[64, -10], (128, 128, 128))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "I;16"])
def test_other_colour_models_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        ramp = np.linspace(0, 65_535, 128).astype(np.uint16)
        Image.fromarray(np.tile(ramp, (128, 1))).save(path)
    else:
        write_face(path, (128, 128), mode)
    got = reference_pixels(load_image(path), 128, 128).astype(int)
    assert got.shape == (128, 128, 3)
    assert got[-1, -1].mean() > 250 and got[0, 0].mean() < 5  # bright corner and dark corner are still that


def make_bad(kind, path):
    if kind == "missing":
        return "No such file"
    if kind == "directory":
        path.mkdir()
        return "is a directory"
    if kind == "text":
        path.write_text("not a picture")
        return "is not an image"
    if kind == "empty":
        path.touch()
        return "is not an image"
    if kind == "truncated":
        write_face(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "cannot read image"
    if kind == "tiny":
        write_face(path, (63, 400))
        return "63x400 pixels; each side needs at least 64"
    # Only the header: the size has to be seen before anything is decoded.
    side = {"huge": 7000, "bomb": 50_000}[kind]
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    with path.open("ab") as file:
        file.write(struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    return "40 million"


@pytest.mark.parametrize("kind", ["missing", "directory", "text", "empty", "truncated", "tiny", "huge", "bomb"])
def test_bad_pictures_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "face.png"
    message = make_bad(kind, path)
    with pytest.raises(ServeError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
