"""What is kept of an image's pixels, and which images are copies of each other by it.

An image is decoded once, for all measures; kept of it are its sizes, hashes and 192 bytes of colour. So memory is small
for an image, but it is not flat: it grows with their number. Time grows with its square, in the search for near copies,
which compares the hashes of every pair.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image, ImageStat

REDUCED = 512  # longest side in pixels at which images are measured, so that one threshold fits all of them
DARK, LIGHT, COVERED = 20, 235, 0.98  # grey levels 0..255, and the share of the image beyond them
FLAT = 4.0  # standard deviation of the most varied colour channel, of 255
ALIKE = 0.975  # correlation of two images as 8 x 8 colours; copies that were resized or made brighter keep it


@dataclass(frozen=True, slots=True)
class Measures:
    """What is kept of an image's pixels."""

    width: int
    height: int
    digest: bytes  # of size and pixels: equal for exact copies
    bits: int  # perceptual hash, 64 bits
    mirrored: int  # the same of the mirrored image
    colours: bytes  # [8, 8, 3] uint8
    sharpness: float  # variance of the Laplacian of the sharpest colour channel
    dark: float  # share of the pixels
    light: float
    spread: float  # standard deviation of the most varied colour channel, 0..255


def measure(image):
    """The Measures of a PIL RGB image. All but its size and digest are taken from it at 512 pixels or fewer."""
    from scipy.fft import dctn  # a slow import that `--help` does not need

    factor = min(1, REDUCED / max(image.size))
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    grey = small.convert("L")
    levels = np.array(grey.histogram()) / (grey.width * grey.height)
    waves = dctn(np.asarray(grey.resize((32, 32), Image.Resampling.BOX), dtype=np.float32))[:8, :8]
    return Measures(
        width=image.width,
        height=image.height,
        digest=xxhash.xxh3_128_digest(f"{image.size}".encode() + image.tobytes()),
        bits=_bits(waves),
        mirrored=_bits(waves * np.where(np.arange(8) % 2, -1, 1)),  # a mirrored cosine of odd order changes its sign
        colours=small.resize((8, 8), Image.Resampling.BOX).tobytes(),
        sharpness=_sharpness(small),
        dark=levels[:DARK].sum(),
        light=levels[LIGHT + 1 :].sum(),
        spread=max(ImageStat.Stat(small).stddev),
    )


def _bits(waves):
    """64 bits: which of the [8, 8] lowest waves of an image are above their median."""
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def _sharpness(image):
    """Variance of the Laplacian of the sharpest colour channel: edges may be of colour alone."""
    if min(image.size) < 3:
        return math.inf
    level = np.asarray(image, dtype=np.float32)
    around = level[:-2, 1:-1] + level[2:, 1:-1] + level[1:-1, :-2] + level[1:-1, 2:]
    return float((around - 4 * level[1:-1, 1:-1]).var((0, 1)).max())


def exact_copies(seen):
    """Tuples of two and more images with the same pixels."""
    groups = defaultdict(list)
    for one in seen:
        groups[one.measures.digest].append(one)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def near_copies(seen, most_bits):
    """Tuples of images that look alike but differ; of exact copies in a split only one stands in them."""
    members = defaultdict(dict)
    for one in seen:
        if looks_empty(one.measures) is None:  # the hash of a plain area is noise
            members[one.measures.digest].setdefault(one.split, one)
    groups = list(members.values())
    measured = [next(iter(group.values())).measures for group in groups]
    pairs = list(near_pairs(measured, most_bits))
    if not pairs:
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(groups), len(groups)))
    together = defaultdict(list)
    for index, label in enumerate(connected_components(graph, directed=False)[1]):
        together[label].append(index)
    alike = (group for group in together.values() if len(group) > 1)
    return [tuple(one for index in group for one in groups[index].values()) for group in alike]


def near_pairs(measured, most_bits, block=256):
    """Yield index arrays [2, pairs] of Measures that look alike, as they are or one of them mirrored.

    The perceptual hashes differ in at most `most_bits` bits, and the 8 x 8 colours correlate by ALIKE or more.
    """
    bits = np.array([one.bits for one in measured], dtype=np.uint64)
    mirrored = np.array([one.mirrored for one in measured], dtype=np.uint64)
    colours = np.frombuffer(b"".join(one.colours for one in measured), dtype=np.uint8).reshape(-1, 8, 8, 3)
    for start in range(0, len(bits), block):
        rows = slice(start, start + block)
        own = _centred(colours[rows])
        for others, turned in ((bits, 1), (mirrored, -1)):
            close = np.bitwise_count(bits[rows, None] ^ others[None, start:]) <= most_bits
            columns = np.flatnonzero(close.any(0))
            alike = own @ _centred(colours[start + columns][:, :, ::turned]).T >= ALIKE
            i, j = np.nonzero(close[:, columns] & alike)
            i, j = start + i, start + columns[j]
            yield np.stack([i, j])[:, i < j]


def _centred(colours):
    """[n, 192] of zero mean and length 1, so that neither brightness nor contrast counts."""
    flat = colours.reshape(len(colours), 8 * 8 * 3).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def looks_empty(measures):
    """ "black", "white" or "flat" where an image shows nearly nothing; None for all others."""
    if measures.dark >= COVERED:
        return "black"
    if measures.light >= COVERED:
        return "white"
    return "flat" if measures.spread < FLAT else None
