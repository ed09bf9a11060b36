"""Open an image file as the RGB image that its maker meant.

Turned as EXIF says; colours brought to sRGB by the embedded profile; transparency laid on white; 16 bits scaled to 8,
not clipped; CMYK, palette, grey and 1-bit converted; the first frame of an animation.
"""

import io
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".heif"}
)
MAX_PIXELS = 178_956_970  # what Pillow itself refuses beyond: a damaged header, an attack, or a huge scan
MAX_PIXELS_TO_SHRINK = 1_000_000_000  # where the image is made smaller at once (--max_side)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is sRGB under another name

pillow_heif.register_heif_opener()  # phones' own format, which PIL does not know
ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image is an error to be named, not a grey area to be learned
Image.MAX_IMAGE_PIXELS = MAX_PIXELS_TO_SHRINK // 2  # Pillow refuses twice as much; our own limit stands in `_opened`
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # generators write whole workflows into their PNGs
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20


class UnreadableImage(ValueError):
    """An image that cannot be decoded to its end; the message names the file and the reason."""


def open_rgb(source, max_pixels=MAX_PIXELS):
    """A PIL RGB image, in sRGB, from a path or an open PIL image. Raises UnreadableImage.

    max_pixels  larger images are refused before they are decoded; MAX_PIXELS_TO_SHRINK where they get smaller at once
    """
    with _opened(source, max_pixels) as image:
        image.load()
        turn = TURNS.get(orientation(image))
        return _to_srgb(image if turn is None else image.transpose(turn))


def remarks(path):
    """The codes of what is to be known of a sound image file, from its headers alone: ["animated", ...].

    Raises UnreadableImage.
    """
    with _opened(path) as image:
        found = ["animated"] if getattr(image, "n_frames", 1) > 1 and image.format != "MPO" else []
        if image.mode == "CMYK" and not image.info.get("icc_profile"):
            found.append("cmyk_without_profile")
        if orientation(image) is None:
            found.append("unreadable_exif")
        return found


def orientation(image):
    """The EXIF orientation of an open PIL image, 1 to 8; 1 where it has none, None where its EXIF cannot be read."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # a PNG's own method would decode it
    except Exception:  # whatever stands there: its pixels are sound
        return None


def size_in_header(path):
    """(height, width) as `open_rgb` gives them, without decoding. Raises UnreadableImage.

    EXIF that stands behind the pixels of a PNG is not seen.
    """
    with _opened(path) as image:
        is_turned = (orientation(image) or 1) >= 5 and image.format != "TIFF"  # PIL turns a TIFF's size itself
        return (image.width, image.height) if is_turned else (image.height, image.width)


def has_other_colours(image):
    """Whether an open PIL image has a colour profile by which `open_rgb` changes its colours."""
    return _conversion(image.info.get("icc_profile"), image.mode) is not None


@contextmanager
def _opened(source, max_pixels=MAX_PIXELS):
    is_path = isinstance(source, str | Path)
    name = source if is_path else getattr(source, "filename", "") or "image"
    if source is None:
        raise UnreadableImage("the row has no image")
    try:
        with Image.open(source) if is_path else source as image:
            if image.width * image.height > max_pixels:
                fix = "`prepare_dataset.py convert` makes it smaller with --max_side"
                most = f"more than {max_pixels / 1e6:.0f} million pixels"
                raise ValueError(f"{image.width} x {image.height} is {most}: {fix}")
            yield image
    except Exception as error:  # on broken files the decoders also raise IndexError, TypeError, struct.error, ...
        advice = "a Git LFS pointer, not the file itself: `git lfs pull` fetches it"
        raise UnreadableImage(f"{name}: {advice if is_path and is_lfs_pointer(source) else error}") from error


def is_lfs_pointer(path):
    """Whether a file is the note that Git leaves where Git LFS did not fetch the content."""
    try:
        with open(path, "rb") as file:
            return file.read(40).startswith(b"version https://git-lfs.github.com/spec")
    except OSError:
        return False


def _to_srgb(image):
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if profile:
            alpha = image.getchannel("A")
            image = _converted(image.convert("RGB"), profile)
            image.putalpha(alpha)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return _converted(image, profile)


def _converted(image, profile):
    """An opaque image as RGB, in sRGB; without the profile, which says nothing about these colours any more."""
    if profile and image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile and image.mode == "L" and not _conversion(profile, "L"):
        image = image.convert("RGB")  # a profile of three colours, in a file that keeps one of them
    conversion = _conversion(profile, image.mode)
    if conversion:
        image = ImageCms.applyTransform(image, conversion)
        image.info.pop("icc_profile", None)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def _conversion(profile, mode):
    """What brings an image of a mode from an embedded profile (bytes) to sRGB.

    None where nothing has to be done: there is no profile, it is sRGB itself or broken, or it is of another mode.
    """
    space = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}.get(mode)
    if not profile or space is None:
        return None
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if found.profile.xcolor_space != space:
            return None
        conversion = ImageCms.buildTransform(
            found, ImageCms.createProfile("sRGB"), mode, "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,  # threads share it
        )  # fmt: skip
        if mode != "CMYK":
            steps = np.linspace(0, 255, 9).round().astype(np.uint8)
            probe = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3) if mode == "RGB" else steps[None]
            probe = Image.fromarray(np.ascontiguousarray(probe))
            before = np.asarray(probe.convert("RGB"), dtype=int)
            after = np.asarray(ImageCms.applyTransform(probe, conversion), dtype=int)
            if np.abs(after - before).max() <= SAME_COLOUR:
                return None
        return conversion
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _scale_deep(image):
    """16-bit greys hold 0..65535, floats 0..1 or 0..255. PIL's own conversion would clip all of them at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    brightest = values.max(initial=0) if image.mode == "F" else 65535
    scale = 255.0 if brightest <= 1 else 1.0 if brightest <= 255 else 255 / 65535
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
