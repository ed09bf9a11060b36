"""Draw a scene: filled (the style of the base model) or in chalk (the style to fine-tune on)."""

import math
import random

from PIL import Image, ImageDraw

from finetuning.shapes.scenes import BACKGROUNDS, COLORS, RADII, SIDE, Scene

SUPERSAMPLE = 4
STYLES = ("filled", "chalk")


def outline(shape, x, y, radius):
    """The corners of a shape whose bounding box is about [x-radius, x+radius] x [y-radius, y+radius]."""
    if shape == "circle":
        corners = [(math.cos(a * math.pi / 32), math.sin(a * math.pi / 32)) for a in range(64)]
    elif shape == "square":
        corners = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    elif shape == "triangle":
        corners = [(0, -1), (1, 0.85), (-1, 0.85)]
    elif shape == "diamond":
        corners = [(0, -1), (1, 0), (0, 1), (-1, 0)]
    elif shape == "cross":
        arm = 0.34
        corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        corners += [(-px, -py) for px, py in corners]
    elif shape == "star":
        corners = []
        for tip in range(10):
            reach, angle = (1.0 if tip % 2 == 0 else 0.42), tip * math.pi / 5
            corners.append((reach * math.sin(angle), -reach * math.cos(angle)))
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return [(x + radius * px, y + radius * py) for px, py in corners]


def places(scene: Scene, rng: random.Random):
    """A centre (x, y) in pixels for each thing, inside the image, and beside each other as the relation says."""
    radii = [RADII[thing.size] for thing in scene.things]
    low, high = [r + 1 for r in radii], [SIDE - 1 - r for r in radii]
    if len(radii) == 1:
        return [(rng.uniform(low[0], high[0]), rng.uniform(low[0], high[0]))]
    first_is_low = scene.relation in ("above", "to the left of")  # "low" along the axis of the relation
    near, far = (0, 1) if first_is_low else (1, 0)
    gap = 1.5
    along, across = [0.0, 0.0], [0.0, 0.0]
    along[near] = rng.uniform(low[near], SIDE - 1 - 2 * radii[far] - gap - radii[near])
    along[far] = rng.uniform(along[near] + radii[near] + gap + radii[far], high[far])
    across[0] = rng.uniform(low[0], high[0])
    # The second stands roughly in line, so that "above" is never also "to the left of".
    across[1] = min(max(across[0] + rng.uniform(-6, 6), low[1]), high[1])
    if scene.relation in ("above", "below"):
        return list(zip(across, along, strict=True))
    return list(zip(along, across, strict=True))


def draw(scene: Scene, seed: int, style="filled", side=SIDE):
    """An RGB image of side x side pixels; the seed decides the places and the strokes of the chalk.

    Another side shows the same image, as fine as it allows.
    """
    rng = random.Random(seed)
    scale = SUPERSAMPLE * side / SIDE
    canvas = Image.new("RGB", (side * SUPERSAMPLE,) * 2, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing, (x, y) in zip(scene.things, places(scene, rng), strict=True):
        radius, color = RADII[thing.size], COLORS[thing.color]
        corners = [(px * scale, py * scale) for px, py in outline(thing.shape, x, y, radius)]
        if style == "filled":
            pen.polygon(corners, fill=color)
        elif style == "chalk":
            _chalk(pen, corners, color, rng, scale)
        else:
            raise ValueError(f"unknown style {style!r}; there are {', '.join(STYLES)}")
    return canvas.resize((side, side), Image.Resampling.BOX)


def _chalk(pen, corners, color, rng, scale):
    """Two trembling strokes along the outline, inside it left open."""
    middle = [sum(axis) / len(corners) for axis in zip(*corners, strict=True)]
    for inset in (0.9, 0.82):
        path = []
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            steps = max(1, int(math.hypot(bx - ax, by - ay) / (4 * scale)))
            for step in range(steps):
                px, py = ax + (bx - ax) * step / steps, ay + (by - ay) * step / steps
                px, py = middle[0] + (px - middle[0]) * inset, middle[1] + (py - middle[1]) * inset
                path.append((px + rng.uniform(-1, 1) * 0.3 * scale, py + rng.uniform(-1, 1) * 0.3 * scale))
        pen.line(path + path[:2], fill=color, width=int(1.8 * scale), joint="curve")
