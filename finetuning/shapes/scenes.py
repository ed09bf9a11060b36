"""Scenes of one or two coloured shapes, their captions, and the combinations that are never trained on.

A caption names everything that an image shows, and every image can be drawn from its caption alone plus a
seed for the position: "a small red circle above a large blue square on a white background".
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 225),
    "purple": (140, 45, 170),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (15, 15, 15), "gray": (128, 128, 128), "pink": (255, 195, 210)}
RADII = {"small": 10, "large": 15}  # in pixels of a 64 px image
RELATIONS = ("above", "below", "to the left of", "to the right of")
SIDE = 64

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Thing:
    """One shape: what is asked for, without its place."""

    size: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a plain background. `relation` places the first thing relative to the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    @property
    def caption(self):
        first, *second = (f"a {thing}" for thing in self.things)
        middle = f" {self.relation} {second[0]}" if second else ""
        return f"{first}{middle} on a {self.background} background"

    @property
    def is_held_out(self):
        """Whether this combination is kept out of every training set, decided by its caption alone."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def parse(caption):
    """The scene that a caption describes. Raises ValueError where the caption is not of this world."""
    size, color, shape, background, relation = map("|".join, (RADII, COLORS, SHAPES, BACKGROUNDS, RELATIONS))
    thing = rf"an? ({size}) ({color}) ({shape})"
    found = re.fullmatch(rf"{thing}(?: ({relation}) {thing})? on a ({background}) background", caption.strip())
    if not found:
        raise ValueError(f"not a caption of the shapes world: {caption!r}")
    *first, relation, size, color, shape, background = found.groups()
    things = (Thing(*first),) + ((Thing(size, color, shape),) if relation else ())
    return Scene(things, background, relation)


def single_scenes(shapes=SHAPES):
    """Every scene of one thing, in a fixed order."""
    for size, color, shape, background in itertools.product(RADII, COLORS, shapes, BACKGROUNDS):
        yield Scene((Thing(size, color, shape),), background)


def draw_scene(rng: random.Random, shapes=SHAPES, pair_share=0.5, held_out=False):
    """A random scene; `held_out` chooses the side of the split, `pair_share` how many have two things."""
    while True:
        count = 2 if rng.random() < pair_share else 1
        things = tuple(
            Thing(rng.choice(list(RADII)), rng.choice(list(COLORS)), rng.choice(shapes)) for _ in range(count)
        )
        relation = rng.choice(RELATIONS) if count == 2 else None
        scene = Scene(things, rng.choice(list(BACKGROUNDS)), relation)
        if scene.is_held_out == held_out:
            return scene
