"""Latents from the cache are those that are encoded at every step."""

import pytest
import torch

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.latents import CachedLatents, LatentArgs, OnTheFlyLatents, latent_source
from finetuning.data.transforms import Draw
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.rng import gaussian


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))


@pytest.fixture
def latents_of(model, data_args):
    """[(batch, its latents)] of the steps 0 to 9 of a dataset's images."""

    def latents_of(images, cached):
        source = latent_source(data_args("unused", cache_latents=cached, seed=0), model, images, "cpu")
        assert isinstance(source, CachedLatents if cached else OnTheFlyLatents)
        sampler = BatchSampler(len(images), 4, 1, 1, 0, seed=0, buckets=images.sizes)
        return [(batch, source(batch)) for batch in images.loader(sampler, 0, 10, 0)]

    return latents_of


@pytest.mark.parametrize("flags", [{}, {"random_flip": True}], ids=str)
@pytest.mark.parametrize("buckets", [False, True])
def test_cached_latents_are_those_of_the_images(load, load_buckets, latents_of, flags, buckets):
    flags = {"center_crop": True} | flags
    options = {"bucket_step": 8, "max_upscale": 4} if buckets else {"resolution": "16"}
    images = lambda: (load_buckets if buckets else load)(**options, **flags)[0]
    fresh, cached = latents_of(images(), False), latents_of(images(), True)
    for (one, latents), (other, from_cache) in zip(fresh, cached, strict=True):
        assert from_cache.shape == (len(one.rows), 4, *(side // 8 for side in one.pixels.shape[2:]))
        torch.testing.assert_close(from_cache, latents)
        assert torch.equal(one.sizes, other.sizes) and one.captions == other.captions
        assert other.pixels.numel() == 0  # no image is opened again
    found = [{batch.sizes[:, 3].max().item() for batch, _ in some} for some in (fresh, cached)]
    assert found[0] == found[1]


def test_an_image_and_its_mirror_image_have_latents_of_their_own(load, model):
    images = load(resolution="16", center_crop=True, random_flip=True)[0]
    cache = CachedLatents(model, images, 0, "cpu")
    assert set(cache.kept) == {False, True}
    mean, mirrored = (cache.kept[flip][3][0][0] for flip in (False, True))
    assert not torch.allclose(mean.flip(-1), mirrored)  # an autoencoder is not symmetric


def test_every_step_draws_its_own_sample_scaled_to_unit_variance(load, latents_of, model):
    images = load(resolution="16", center_crop=True)[0]
    found = {}
    for batch, latents in latents_of(images, True):
        for row, latent in zip(batch.rows, latents, strict=True):
            found.setdefault(row, []).append((batch.step, latent))
    (first, one), (second, other), *_ = found[3]
    mean, std = model.codec.posterior(images.transform.apply(images.image(3), Draw())[0][None])
    for step, latent in ((first, one), (second, other)):
        expected = (mean + std * gaussian(0, "posterior", step, [3], mean.shape[1:])) * 0.18215
        torch.testing.assert_close(latent[None], expected)
    assert first != second and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, ["--center_crop"]),
        ({"center_crop": True}, []),
        ({"center_crop": True, "random_resized_crop_scale": 0.5}, ["--random_resized_crop_scale"]),
        ({"cache_latents": False, "random_resized_crop_scale": 0.5}, []),
    ],
)
def test_flags_that_the_cache_does_not_go_with_are_named(data_args, flags, named):
    problems = list(LatentArgs.problems(data_args("unused", **({"cache_latents": True} | flags))))
    assert len(problems) == len(named) and all(map(str.__contains__, problems, named))
