"""Open an image file as the RGB image that its maker meant.

Turned as EXIF says; transparency laid on white; 16 bits scaled to 8, not clipped; CMYK, palette, grey and 1-bit
converted; the first frame of an animation.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageFile, ImageOps

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".heif"}
)

pillow_heif.register_heif_opener()  # phones' own format, which PIL does not know
ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image is a fault to be named, not a grey area to be learned


class UnreadableImage(ValueError):
    """An image that cannot be decoded to its end; the message names the file and the reason."""


def open_rgb(source):
    """A PIL RGB image from a path or an open PIL image. Raises UnreadableImage."""
    with _opened(source) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def frames(path):
    """How many frames the file has; 1 for a still image. Reads the headers alone. Raises UnreadableImage."""
    with _opened(path) as image:
        return getattr(image, "n_frames", 1)


@contextmanager
def _opened(source):
    name = source if isinstance(source, str | Path) else getattr(source, "filename", "") or "image"
    try:
        with Image.open(source) if isinstance(source, str | Path) else source as image:
            yield image
    except Exception as error:  # on broken files the decoders also raise IndexError, TypeError, struct.error, ...
        raise UnreadableImage(f"{name}: {error}") from error


def _to_rgb(image):
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_deep(image):
    """16-bit greys hold 0..65535, floats 0..1 or 0..255. PIL's own conversion would clip all of them at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    brightest = values.max(initial=0) if image.mode == "F" else 65535
    scale = 255.0 if brightest <= 1 else 1.0 if brightest <= 255 else 255 / 65535
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
