"""Captions of the shapes world, and networks that cost nothing: what both measure is the brightness of an image."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetuning.evaluation import networks
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.measuring import Networks
from finetuning.evaluation.networks import Weights
from finetuning.evaluation.preprocessing import matched


def bright(image):
    """The mean of a PIL image, or of one in a file, from 0 for black to 1 for white."""
    return np.asarray(Image.open(image) if isinstance(image, Path) else image, np.float64).mean() / 255


class BrightnessClip:
    """Stands in for ClipScorer: an image is an angle, from 0 for black to a right one for white; a caption is black."""

    truncated = 0

    def images(self, images):
        angles = np.array([bright(image) for image in images]) * np.pi / 2
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def texts(self, captions):
        return np.tile([1.0, 0.0], (len(captions), 1))


@pytest.fixture
def brightness():
    return bright


@pytest.fixture
def captions():
    """Four captions that the shapes' checker can judge."""
    return [
        "a small red circle on a white background",
        "a large blue square on a white background",
        "a large green star on a black background",
        "a small purple cross on a white background",
    ]


@pytest.fixture
def opened(monkeypatch):
    """Networks: LPIPS is the difference in brightness, Inception's features the corners of a 2 x 2 image."""
    weights = lambda name: Weights(name, f"{name}.pth", "0" * 64, True)
    apart = lambda network, a, b: np.array([abs(bright(x) - bright(y)) for x, y in zip(a, b, strict=True)])
    monkeypatch.setattr(networks, "lpips_of", apart)

    def corners(paths, side, *how):
        images = [matched(Image.open(path), side).resize((2, 2), Image.Resampling.BOX) for path in paths]
        return np.stack([np.asarray(image, np.float64).ravel() / 255 for image in images])

    monkeypatch.setattr(networks, "features_of", corners)
    found = {name: (None, weights(name)) for name in ("inception", "lpips")}
    found["clip"] = BrightnessClip(), weights("clip")
    return Networks(found, {}, load_checker("finetuning.shapes.checker"))
