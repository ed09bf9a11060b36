"""Read an image of the shapes world pixel by pixel: which shapes, colours, sizes, places, background and style.

No network is asked. The background is the commonest colour of the border; what differs from it is cut into connected
things; a thing's colour is the nearest of the palette to the median of its own pixels; its shape is the one whose
drawn silhouette overlaps its filled silhouette best; its style is how much of that silhouette is painted.

This module is also a checker (finetuning/evaluation/checkers.py): --checker finetuning.shapes.checker.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from finetuning.evaluation.metrics import Metric
from finetuning.shapes.drawing import outline
from finetuning.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIDE, Scene, Thing, parse

DIFFERS = 60  # RGB distance from the background at which a pixel belongs to a thing
SMALLEST = 30  # pixels of the filled silhouette; less is a speck
LARGE_FROM = 24  # pixels of the longer side
FILLED_FROM = 0.9  # share of the silhouette that is painted
TEMPLATE = 48

# -- the checker's interface -----------------------------------------------------------------------------------------

METRICS = {
    "shapes": Metric(
        "right shapes",
        "share of images with the shape and colour of their caption",
        role="retained",
        verdict="on the general prompts it is right {kept} as often as {reference}",
    ),
    "style": Metric("chalk style", "share of the things in an image that are drawn in chalk", role="learned"),
}


def check(caption):
    """Raises ValueError for a caption that is not of the shapes world."""
    parse(caption)


def scores(image, caption):
    """{"shapes": 1.0 or 0.0, "style": share of things in chalk}; no "shapes" where the caption is of another world."""
    seen = read(image)
    found = {"style": _share_in_chalk(seen)}
    try:
        agreement = _agreement(parse(caption), seen)
    except ValueError:
        return found
    return {"shapes": float(agreement["shape"] and agreement["color"])} | found


# -- reading an image ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One thing as it was read off an image."""

    thing: Thing
    x: float
    y: float
    overlap: float  # intersection over union with the best shape, 0..1
    painted: float  # share of the silhouette that differs from the background

    @property
    def style(self):
        return "filled" if self.painted >= FILLED_FROM else "chalk"


def read(image):
    """(background, [Seen, ...] from the largest to the smallest) of a PIL image."""
    from scipy import ndimage

    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    plain = np.median(border, axis=0)
    painted = np.linalg.norm(pixels - plain, axis=-1) > DIFFERS
    filled = ndimage.binary_fill_holes(painted)
    labels, count = ndimage.label(filled)
    seen = []
    for number in range(1, count + 1):
        silhouette = labels == number
        if silhouette.sum() >= SMALLEST:
            seen.append(_read_thing(pixels, plain, painted, silhouette))
    seen.sort(key=lambda one: -one[0])
    return _nearest(plain, BACKGROUNDS), [one for _, one in seen]


def agrees(scene: Scene, image):
    """{"shape", "color", "size", "background", "count", "axis", "relation", "all"}: whether the image shows it.

    shape and color look at the asked things alone, matched in the way that is best for them. axis: two things stand
    over or beside each other as asked, in either order; relation: in the order asked. "all" wants everything.
    """
    return _agreement(scene, read(image))


def _agreement(scene, read_off):
    background, seen = read_off
    wanted = scene.things
    right = {"background": background == scene.background, "count": len(seen) == len(wanted)}
    found = _match(scene, seen)
    for part in ("shape", "color", "size"):
        right[part] = all(
            one is not None and getattr(one.thing, part) == getattr(thing, part)
            for thing, one in zip(wanted, found, strict=True)
        )
    placed = scene.relation is None or None not in found
    right["relation"] = placed and (scene.relation is None or _stands(scene.relation, *found))
    right["axis"] = right["relation"] or (placed and _stands(scene.relation, *found[::-1]))
    right["all"] = all(right.values())
    return right


def _share_in_chalk(read_off):
    """The share of an image's things that are not filled; 0.0 where it shows nothing."""
    things = read_off[1]
    return sum(one.style == "chalk" for one in things) / max(1, len(things))


def _match(scene, seen):
    """For each thing asked for, what was seen of it or None; of two, in the order that fits better."""
    wanted = scene.things
    seen = list(seen[: len(wanted)]) + [None] * (len(wanted) - len(seen))
    orders = [seen, seen[::-1]] if len(wanted) == 2 else [seen]

    def fit(order):
        pairs = [(thing, one.thing) for thing, one in zip(wanted, order, strict=True) if one]
        score = sum((a.shape == b.shape) + (a.color == b.color) + 0.5 * (a.size == b.size) for a, b in pairs)
        return score + 0.25 * (len(pairs) == 2 and _stands(scene.relation, *order))

    return max(orders, key=fit)


def _stands(relation, first, second):
    dx, dy = first.x - second.x, first.y - second.y
    return {
        "above": dy < 0 and abs(dy) > abs(dx),
        "below": dy > 0 and abs(dy) > abs(dx),
        "to the left of": dx < 0 and abs(dx) > abs(dy),
        "to the right of": dx > 0 and abs(dx) > abs(dy),
    }[relation]


def _read_thing(pixels, plain, painted, silhouette):
    """(area, Seen)."""
    rows, columns = np.flatnonzero(silhouette.any(1)), np.flatnonzero(silhouette.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    own = silhouette & painted
    # Pixels at an edge mix with the background: the colour is read where it is furthest from it.
    distance = np.linalg.norm(pixels - plain, axis=-1)
    strong = own & (distance >= np.quantile(distance[own], 0.6))
    color = _nearest(np.median(pixels[strong], axis=0), COLORS)
    cut = silhouette[top:bottom, left:right]
    overlaps = {shape: _overlap(cut, shape) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.get)
    size = "large" if max(bottom - top, right - left) >= LARGE_FROM else "small"
    center_y, center_x = (top + bottom) / 2, (left + right) / 2
    area = silhouette.sum()
    return area, Seen(Thing(size, color, shape), center_x, center_y, overlaps[shape], own.sum() / area)


def _overlap(cut, shape):
    """Intersection over union with the shape drawn into the same box."""
    stretched = np.asarray(Image.fromarray(cut).resize((TEMPLATE, TEMPLATE), Image.Resampling.NEAREST))
    template = _template(shape)
    return (stretched & template).sum() / (stretched | template).sum()


@cache
def _template(shape):
    """The shape's silhouette, its bounding box stretched over TEMPLATE x TEMPLATE pixels."""
    corners = np.array(outline(shape, 0, 0, 1))
    low, high = corners.min(0), corners.max(0)
    scaled = (corners - low) / (high - low) * TEMPLATE
    image = Image.new("1", (TEMPLATE, TEMPLATE))
    ImageDraw.Draw(image).polygon([tuple(point) for point in scaled], fill=1)
    return np.asarray(image)


def _nearest(color, palette):
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))
