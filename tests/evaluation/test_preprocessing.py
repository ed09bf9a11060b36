"""Images are cut, matched and resized as POLICY and the protocols say, and none that is broken is lost."""

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.preprocessing import matched, network_input, read_images


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edges(side):
    """Black beside white: a bicubic filter overshoots here."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five good images of different sizes."""
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate([(32, 32), (40, 32), (32, 50), (33, 32), (64, 64)]):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def broken(tmp_path):
    """One of each kind that cannot be read."""
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    noise(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    values = np.zeros((40, 40), np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tiff")
    return [tmp_path / name for name in ("empty.png", "text.jpg", "half.png", "nan.tiff", "missing.png")]


def test_an_image_that_fits_is_left_as_it_is():
    image = noise(48, 48)
    assert np.array_equal(matched(image, 48), image)


@pytest.mark.parametrize(
    ("size", "left", "top"), [((70, 48), 11, 0), ((48, 70), 0, 11), ((71, 48), 11, 0), ((48, 49), 0, 0)]
)
def test_the_centre_square_is_taken(size, left, top):
    image = noise(*size)
    assert np.array_equal(matched(image, 48), np.asarray(image)[top : top + 48, left : left + 48])


@pytest.mark.parametrize("side", [16, 100])
def test_other_sizes_are_resized_as_pil_does(side):
    cut = np.asarray(noise(60, 44))[:, 8:52]
    wanted = Image.fromarray(cut).resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(matched(noise(60, 44), side), wanted)


def test_reducing_is_antialiased():
    """Every second pixel of fine checkers has the same colour: picking pixels out would give black or white."""
    checkers = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(np.asarray(matched(checkers, 32), float) - 127.5).max() < 4


@pytest.mark.parametrize("side", [24, 299, 330])
def test_clean_is_pils_bicubic_on_float_channels(side):
    image = edges(side) if side == 24 else noise(side, side)
    floats = [channel.convert("F").resize((299, 299), Image.Resampling.BICUBIC) for channel in image.split()]
    wanted = (np.clip(np.stack([np.array(one) for one in floats]), 0, 255) - 128) / 128
    given = network_input([image], "clean")
    assert given.dtype == torch.float32 and given.shape == (1, 3, 299, 299)
    np.testing.assert_allclose(given[0].numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_matched_in_batches_and_in_order(folder, workers):
    paths = sorted(folder.iterdir())
    batches = list(read_images(paths, 32, 2, workers, make=np.stack))
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches[0].dtype == np.uint8
    assert np.array_equal(np.concatenate(batches), np.stack([matched(Image.open(path), 32) for path in paths]))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_image_is_named_at_once(folder, broken, workers):
    good = sorted(folder.iterdir())
    read = read_images([*good[:2], *broken[:3], *good[2:], *broken[3:]], 32, 2, workers)
    assert len(next(read)) == 2
    with pytest.raises(EvaluationError, match=r"5 image\(s\) cannot be read") as problem:
        next(read)
    assert all(path.name in str(problem.value) for path in broken)
    assert not any(path.name in str(problem.value).replace("half.png", "") for path in good)
