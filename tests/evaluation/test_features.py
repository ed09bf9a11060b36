"""Features are computed once for each content, protocol, side and weights file, and never taken for others."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.networks import Weights, features_of
from finetuning.evaluation.preprocessing import matched, network_input

WEIGHTS = Weights("inception", "here", "a" * 64, False)


class Counting(nn.Module):
    """A network of 12 features that counts the images it is given."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, inputs):
        assert not torch.is_grad_enabled()
        self.seen += len(inputs)
        return nn.functional.adaptive_avg_pool2d(inputs, 2).flatten(1)


@pytest.fixture
def network():
    return Counting()


@pytest.fixture
def paths(tmp_path):
    """Seven images of three sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(7):
        draw(folder / f"{index}.png", index)
    return sorted(folder.iterdir())


def draw(path, seed):
    width, height = [(20, 20), (30, 24), (24, 40)][seed % 3]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def of(paths, network, cache=None, *, side=20, protocol="clean", weights=WEIGHTS, batch_size=3, workers=0):
    return features_of(paths, side, network, protocol, weights, cache, batch_size, workers, "cpu")


def by_hand(paths, protocol="clean", side=20):
    inputs = torch.cat([network_input([matched(Image.open(path), side)], protocol) for path in paths])
    with torch.no_grad():
        return Counting()(inputs).double().numpy()


@pytest.mark.parametrize(("protocol", "side"), [("clean", 20), ("legacy", 20), ("clean", 16)])
def test_features_are_the_networks_in_the_order_of_the_files(paths, network, protocol, side):
    found = of(paths[::-1], network, protocol=protocol, side=side)
    assert found.dtype == np.float64 and network.seen == 7
    np.testing.assert_allclose(found, by_hand(paths[::-1], protocol, side), rtol=1e-6)


def test_the_second_call_computes_nothing(paths, network, tmp_path):
    first = of(paths, network, tmp_path / "cache")
    assert network.seen == 7
    moved = [path.rename(path.with_name(f"moved{path.name}")) for path in paths]
    assert np.array_equal(of(moved, network, tmp_path / "cache"), first)
    assert np.array_equal(of(moved[::-2], network, tmp_path / "cache"), first[::-2])
    assert network.seen == 7


def test_a_changed_image_alone_is_computed_again(paths, network, tmp_path):
    first = of(paths, network, tmp_path / "cache")
    status = paths[3].stat()
    draw(paths[3], 12)  # as large as before
    os.utime(paths[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    second = of(paths, network, tmp_path / "cache")
    assert network.seen == 8
    assert np.array_equal(np.delete(first, 3, 0), np.delete(second, 3, 0))
    np.testing.assert_allclose(second[3], by_hand(paths[3:4])[0], rtol=1e-6)
    assert np.array_equal(of(paths, network, tmp_path / "cache"), second)
    assert network.seen == 8


@pytest.mark.parametrize(
    "other",
    [{"protocol": "legacy"}, {"side": 16}, {"weights": Weights("inception", "here", "b" * 64, False)}],
    ids=["protocol", "side", "weights"],
)
def test_what_was_computed_otherwise_is_never_taken(paths, network, tmp_path, other):
    of(paths, network, tmp_path / "cache")
    found = of(paths, network, tmp_path / "cache", **other)
    assert network.seen == 14
    assert np.array_equal(found, of(paths, network, **other))


def test_sets_share_what_they_have_in_common(paths, network, tmp_path):
    of(paths[:4], network, tmp_path / "cache")
    of(paths[2:], network, tmp_path / "cache")
    assert np.array_equal(of(paths, network, tmp_path / "cache"), of(paths, Counting(), batch_size=1))
    assert network.seen == 7


def test_the_same_content_under_two_names_has_the_same_features(paths, network, tmp_path):
    twin = tmp_path / "twin.png"
    twin.write_bytes(paths[0].read_bytes())
    found = of([*paths, twin], network, tmp_path / "cache")
    assert np.array_equal(found[0], found[-1])


def test_a_broken_part_of_the_cache_is_named(paths, network, tmp_path):
    of(paths, network, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(EvaluationError, match=f"delete {kept}"):
        of(paths, network, tmp_path / "cache")
    kept.write_bytes(whole[:100])
    with pytest.raises(EvaluationError, match=f"delete {kept}"):
        of(paths, network, tmp_path / "cache")


def test_a_killed_write_is_no_part_of_the_cache(paths, network, tmp_path):
    of(paths, network, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.rename(kept.with_name(f".incomplete-{kept.name}"))
    of(paths, network, tmp_path / "cache")
    assert network.seen == 14


def test_every_image_that_cannot_be_read_is_named_and_nothing_kept(paths, network, tmp_path):
    for name in ("zero", "void"):
        paths.insert(2, tmp_path / f"{name}.png")
        paths[2].write_bytes(b"")
    paths.append(tmp_path / "gone.png")
    with pytest.raises(EvaluationError, match=r"3 image\(s\) cannot be read") as problem:
        of(paths, network, tmp_path / "cache")
    assert all(f"{name}.png" in str(problem.value) for name in ("zero", "void", "gone"))
    assert not (tmp_path / "cache").exists()


def test_features_that_are_not_finite_are_named(paths, network, tmp_path):
    dark = tmp_path / "dark.png"
    Image.new("RGB", (20, 20)).save(dark)
    undefined = lambda inputs: (inputs + 1).sqrt().log().nan_to_num(1, neginf=np.inf).flatten(1)[:, :5]
    with pytest.raises(EvaluationError, match=r"features of 1 image\(s\) are not finite.*dark.png"):
        of([*paths, dark], undefined, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
