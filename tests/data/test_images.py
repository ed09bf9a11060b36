"""An image file is opened as its maker meant it, or named as unreadable."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetuning.data import images
from finetuning.data.images import (
    EXTENSIONS,
    UnreadableImage,
    has_other_colours,
    open_rgb,
    orientation,
    remarks,
    size_in_header,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
ORIENTATION = 0x0112  # the EXIF tag


def pil_image(mode, *rows):
    """An image from rows of pixel values."""
    image = Image.new(mode, (len(rows[0]), len(rows)))
    image.putdata([value for row in rows for value in row])
    return image


def plain(color):
    return Image.new("RGB", (4, 4), color)


def pixels(image):
    """Rows of RGB tuples."""
    assert image.mode == "RGB"
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [  # what the EXIF standard says of a stored R G / B W
        (1, "RG BW"), (2, "GR WB"), (3, "WB GR"), (4, "BW RG"), (5, "RB GW"), (6, "BR WG"), (7, "WG BR"), (8, "GW RB"),
    ],
)  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, orientation, shown):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path, pil_image("RGB", [RED, GREEN], [BLUE, WHITE]), exif=exif)
    letters = {RED: "R", GREEN: "G", BLUE: "B", WHITE: "W"}
    assert " ".join("".join(letters[pixel] for pixel in row) for row in pixels(open_rgb(path))) == shown


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_opened_image(tmp_path, name, value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    path = saved(tmp_path, Image.new("RGB", (32, 16)), name, exif=exif)
    assert size_in_header(path) == open_rgb(path).size[::-1]


@pytest.mark.parametrize("name", ["x.png", "x.webp"])
def test_exif_that_cannot_be_read_is_ignored_with_a_remark(tmp_path, name):
    path = saved(tmp_path, Image.new("RGB", (32, 16), RED), name, exif=b"Exif\0\0no TIFF at all")
    assert open_rgb(path).size == (32, 16) and size_in_header(path) == (16, 32)
    assert remarks(path) == ["unreadable_exif"]
    with Image.open(path) as image:
        assert orientation(image) is None


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# A profile under which the first number is blue and the last one is red.
SWAPPED = SRGB.replace(b"rXYZ", b"hold").replace(b"bXYZ", b"rXYZ").replace(b"hold", b"bXYZ")
STORED, IN_SRGB = (40, 40, 200), (200, 40, 40)  # one colour, in the numbers of either


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
def test_colours_are_brought_to_srgb_by_the_embedded_profile(tmp_path, name):
    options = {"lossless": True} if name == "x.webp" else {"quality": 100, "subsampling": 0} if name == "x.jpg" else {}
    path = saved(tmp_path, Image.new("RGB", (16, 16), STORED), name, icc_profile=SWAPPED, **options)
    image = open_rgb(path)
    assert image.getpixel((8, 8)) == pytest.approx(IN_SRGB, abs=3)
    assert "icc_profile" not in image.info  # the numbers are sRGB now
    with Image.open(path) as stored:
        assert has_other_colours(stored)


def test_transparency_and_palettes_have_profiles_too(tmp_path):
    clear = pil_image("RGBA", [(*STORED, 255), (*STORED, 0)])
    assert pixels(open_rgb(saved(tmp_path, clear, icc_profile=SWAPPED)))[0][1] == WHITE
    assert pixels(open_rgb(saved(tmp_path, clear, icc_profile=SWAPPED)))[0][0] == pytest.approx(IN_SRGB, abs=2)
    palette = Image.new("RGB", (4, 4), STORED).quantize(2)
    assert open_rgb(saved(tmp_path, palette, icc_profile=SWAPPED)).getpixel((1, 1)) == pytest.approx(IN_SRGB, abs=2)


@pytest.mark.parametrize(
    ("mode", "icc"), [("RGB", SRGB), ("RGB", b"no profile"), ("L", SRGB), ("L", SWAPPED[:99]), ("RGB", None)],
    ids=["srgb", "broken", "grey", "cut", "none"],  # a profile holds the time at which it was made
)  # fmt: skip
def test_images_in_srgb_keep_every_pixel(tmp_path, mode, icc):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    opened = open_rgb(saved(tmp_path, image, icc_profile=icc))
    assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_a_cmyk_image_without_a_profile_is_remarked_on(tmp_path):
    assert remarks(saved(tmp_path, Image.new("CMYK", (4, 4)), "print.jpg")) == ["cmyk_without_profile"]


def test_rgba_lies_on_white(tmp_path):
    image = pil_image("RGBA", [(255, 0, 0, 255), (0, 255, 0, 0), (255, 0, 0, 128)])
    shown = pixels(open_rgb(saved(tmp_path, image)))[0]
    assert shown[:2] == [RED, WHITE]  # the green that a transparent pixel hides is not shown
    assert shown[2] == pytest.approx((255, 127, 127), abs=1)


def test_transparent_palette_colour_lies_on_white(tmp_path):
    image = pil_image("P", [0, 1])
    image.putpalette([*GREEN, *BLUE])
    assert pixels(open_rgb(saved(tmp_path, image, transparency=0))) == [[WHITE, BLUE]]


@pytest.mark.parametrize(("mode", "values", "key"), [("RGB", [GREEN, BLUE], GREEN), ("L", [7, 0], 7)])
def test_a_colour_marked_as_transparent_lies_on_white(tmp_path, mode, values, key):
    shown = pixels(open_rgb(saved(tmp_path, pil_image(mode, values), transparency=key)))[0]
    assert shown == [WHITE, BLUE if mode == "RGB" else BLACK]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    image = Image.fromarray(np.array([[0, 257, 30000, 65535]], dtype=np.uint16))
    shown = pixels(open_rgb(saved(tmp_path, image, name)))[0]
    assert [pixel[0] for pixel in shown] == [0, 1, 117, 255]  # 30000 / 257 = 116.7
    assert all(len(set(pixel)) == 1 for pixel in shown)


def test_float_image_of_0_to_1_fills_the_range(tmp_path):
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    shown = pixels(open_rgb(saved(tmp_path, image, "float.tif")))[0]
    assert [pixel[0] for pixel in shown] == [0, 128, 255]


def test_cmyk_becomes_rgb(tmp_path):
    image = pil_image("CMYK", [(0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255)])
    assert pixels(open_rgb(saved(tmp_path, image, "print.tif"))) == [[RED, WHITE, BLACK]]


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    shown = open_rgb(saved(tmp_path, image, "print.jpg", quality=95))
    assert shown.getpixel((8, 8)) == pytest.approx(RED, abs=12)


def test_animation_shows_its_first_frame(tmp_path):
    path = saved(tmp_path, plain(RED), "moving.gif", save_all=True, append_images=[plain(BLUE), plain(GREEN)])
    assert open_rgb(path).getpixel((2, 2)) == RED
    assert remarks(path) == ["animated"]


def test_animation_cut_after_its_first_frame_is_unreadable(tmp_path):
    path = saved(tmp_path, plain(RED), "cut.gif", save_all=True, append_images=[plain(BLUE)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\x21\xf9\x04") + 11])  # into the second frame's description
    assert open_rgb(path).getpixel((2, 2)) == RED
    with pytest.raises(UnreadableImage, match=r"cut\.gif: "):
        remarks(path)


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_every_extension_that_is_looked_for_can_be_opened(tmp_path, extension):
    writer = "JPEG" if extension == ".jfif" else None
    assert open_rgb(saved(tmp_path, Image.new("RGB", (16, 16), WHITE), f"x{extension}", format=writer)).size == (16, 16)


def test_a_path_as_text_and_an_open_image_are_taken_too(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert pixels(open_rgb(str(path))) == [[WHITE] * 2] * 2
    assert pixels(open_rgb(Image.open(path))) == [[WHITE] * 2] * 2


def cut_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "JPEG")
    return whole.getvalue()[: len(whole.getvalue()) // 2]


def test_unreadable_open_image_is_named(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(cut_jpeg())
    with pytest.raises(UnreadableImage, match=r"cut\.jpg: .*truncated"):
        open_rgb(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize("read", [open_rgb, remarks, size_in_header])
def test_an_image_of_absurd_size_is_unreadable_and_says_how_to_shrink_it(tmp_path, monkeypatch, read):
    path = saved(tmp_path, Image.new("RGB", (10, 10)))
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    monkeypatch.setattr(images._opened.__wrapped__, "__defaults__", (10,))
    monkeypatch.setattr(open_rgb, "__defaults__", (10,))
    with pytest.raises(UnreadableImage, match=r"image\.png.*10 x 10.*--max_side"):
        read(path)
    assert open_rgb(path, max_pixels=100).size == (10, 10)


def test_a_git_lfs_pointer_says_git_lfs(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UnreadableImage, match=r"x\.png.*git lfs pull"):
        open_rgb(path)
