"""The cache on disk: what comes from it is what is encoded at every step, and nothing old is ever found."""

import gc
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data import tensor_store, transforms
from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.cache import CacheArgs, CachedLatents, CachedText, build_encoder
from finetuning.data.tensor_store import TensorStore, written_in_shards
from finetuning.data.transforms import Draw
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.rng import gaussian

STEPS = 12  # four epochs


@pytest.fixture
def model(tiny_model):
    return load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)))


class FakeRun(SimpleNamespace):
    """A run of one process without accelerate; `said` holds what the person at the terminal reads."""

    def __init__(self, device="cpu"):
        super().__init__(processes=1, process=0, is_main=True, device=torch.device(device), said=[])
        self.say, self.gathered, self.wait_for_everyone = self.said.append, list, lambda: None
        self.shared = lambda items, compute: compute(items)


FLAGS = {"center_crop": True, "resolution": "16"}


@pytest.fixture
def encoder_of(model, load, data_args, tmp_path):
    """The encoder of a dataset's images, not built yet; `said` is what its run says."""

    def encoder_of(cache_latents="on", images=None, total_steps=STEPS, folder="cache", **flags):
        flags, folder = FLAGS | flags, str(tmp_path / folder)
        images = images or load(**flags)[0]
        args = data_args("unused", cache_latents=cache_latents, cache_folder=folder, seed=0, **flags)
        sampler = BatchSampler(len(images), 4, 1, 1, 0, seed=0, buckets=images.sizes)
        data = SimpleNamespace(training=images, batch_sampler=sampler, total_steps=total_steps)
        run = FakeRun()
        encoder = build_encoder(args, run, model, data)
        encoder.said, encoder.sampler, encoder.images = run.said, sampler, images
        return encoder

    return encoder_of


def encoded(encoder, steps=STEPS // 2):
    """[(batch, latents, text)] of the first steps of a run."""
    encoder.build()
    batches = encoder.images.loader(encoder.sampler, 0, steps, 0)
    found = [(batch, *encoder(batch)) for batch in batches]
    return [(batch, latents, conditioning["text"]) for batch, latents, conditioning in found]


def assert_equal(fresh, cached):
    """Not a bit is different, whether it is encoded at every step or comes from the cache."""
    assert len(fresh) == len(cached) > 0
    for (one, latents, text), (other, from_cache, text_from_cache) in zip(fresh, cached, strict=True):
        assert torch.equal(latents, from_cache) and latents.dtype == from_cache.dtype
        assert text.keys() == text_from_cache.keys()
        assert all(torch.equal(value, text_from_cache[name]) for name, value in text.items())
        assert torch.equal(one.sizes, other.sizes) and one.captions == other.captions
        assert other.pixels.numel() == 0 < one.pixels.numel()  # no image is opened again


# -- the same as without -----------------------------------------------------------------------------------------------


@pytest.fixture
def several_captions(folder):
    """Every second image has two captions, one of which names a side."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line["text"] = [line["text"], "square left"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "flags",
    [
        {"center_crop": True},
        {"center_crop": True, "random_flip": True},
        {"cached_crops": 2, "random_flip": True, "proportion_empty_prompts": 0.4, "flip_captions": "swap"},
        {"cached_crops": 3, "random_resized_crop_scale": 0.5, "caption_prefix": "red", "caption_choice": "first"},
    ],
    ids=str,
)
def test_what_is_cached_is_what_is_encoded_at_every_step(several_captions, encoder_of, flags):
    flags = {"center_crop": False, **flags}
    live = encoder_of("off", **flags)
    assert (live.cached, live.bytes_needed) == ([], 0)
    fresh, cached = encoded(live, STEPS), encoded(encoder_of(**flags), STEPS)
    assert_equal(fresh, cached)
    flipped = {caption for batch, *_ in fresh for caption in batch.captions if "right" in caption}
    assert bool(flipped) == (flags.get("flip_captions") == "swap")
    assert any("" in batch.captions for batch, *_ in fresh) == ("proportion_empty_prompts" in flags)


def test_buckets_are_part_of_what_is_cached(load_buckets, encoder_of):
    images = lambda: load_buckets(bucket_step=8, max_upscale=4, center_crop=True, random_flip=True)[0]
    fresh, cached = (encoded(encoder_of(mode, images())) for mode in ("off", "on"))
    assert_equal(fresh, cached)
    assert len({latents.shape[2:] for _, latents, _ in cached}) > 1


def test_every_step_draws_its_own_sample_scaled_to_unit_variance(load, encoder_of, model):
    images, found = load(**FLAGS)[0], {}
    for batch, latents, _ in encoded(encoder_of(images=images)):
        for row, latent in zip(batch.rows, latents, strict=True):
            found.setdefault(row, []).append((batch.step, latent))
    (first, one), (second, other), *_ = found[3]
    mean, std = model.codec.posterior(images.transform.apply(images.image(3), Draw())[0][None])
    for step, latent in ((first, one), (second, other)):
        expected = (mean + std * gaussian(0, "posterior", step, [3], mean.shape[1:])) * 0.18215
        assert torch.equal(latent[None], expected)
    assert first != second and not torch.equal(one, other)


def test_an_image_and_its_mirror_image_have_latents_of_their_own(encoder_of):
    encoder = encoder_of(random_flip=True)
    encoder.build()
    assert len(encoder.cached_latents.wanted) == 22
    plain, mirrored = (
        encoder.cached_latents.store.read(encoder.cached_latents.keys[0, flip])["mean"] for flip in (0, 1)
    )
    assert not any(map(torch.allclose, plain.flip(-1), mirrored))  # an autoencoder is not symmetric


def test_each_of_the_fixed_crops_has_its_turn(load):
    images = load(cached_crops=3)[0]
    crops = [images.transform.draw(epoch, 0) for epoch in range(7)]
    assert len(set(crops)) == 3 and crops[:3] == crops[3:6] and crops[0] == crops[6]
    assert crops[:3] == [load()[0].transform.draw(epoch, 0) for epoch in range(3)]


# -- nothing old is found ----------------------------------------------------------------------------------------------


def keep_time(path, change):
    """Change a file and give it the modification time that it had."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def edit(path):
    image = Image.open(path).convert("RGB")
    image.putpixel((6, 6), (255, 0, 0))
    image.save(path)


CHANGES = {
    "edited": (lambda folder: keep_time(folder / "03.png", edit), {}, 1),
    "re-encoded": (lambda folder: Image.open(folder / "03.png").save(folder / "03.png", compress_level=0), {}, 1),
    "exchanged": (lambda folder: shutil.copy(folder / "04.png", folder / "03.png"), {}, 0),
    "renamed": (lambda folder: swap_names(folder), {}, 0),
    "touched": (lambda folder: (folder / "03.png").touch(), {}, 0),
    "cut elsewhere": (None, {"cached_crops": 1, "center_crop": False}, 11),
    "mirrored": (None, {"random_flip": True}, 11),
    "of another size": (None, {"resolution": "24"}, 11),
    "resized otherwise": (None, {"image_interpolation_mode": "box"}, 11),
}


def swap_names(folder):
    for old, new in (("03", "x"), ("04", "03"), ("x", "04")):
        (folder / f"{old}.png").rename(folder / f"{new}.png")


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_is_the_same_image_cut_the_same_way_is_found(folder, encoder_of, change):
    act, flags, missing = CHANGES[change]
    encoder_of().build()
    again = encoder_of()
    assert again.cached_latents.missing == [] and again.cached_text.missing == [] and again.bytes_needed == 0
    if act:
        act(folder)
    again = encoder_of(**flags)
    assert len(again.cached_latents.missing) == missing and again.cached_text.missing == []
    assert (again.bytes_needed > 0) == (missing > 0)
    assert_equal(encoded(encoder_of("off", **flags)), encoded(again))


def nudged(module):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3


@pytest.mark.parametrize(
    ("change", "latents", "text"),
    [
        (lambda model, patch: nudged(model.components["vae"]), 11, 0),
        (lambda model, patch: nudged(model.components["text_encoder"]), 0, 11),
        (lambda model, patch: model.to_device("cpu", torch.bfloat16), 11, 11),
        (lambda model, patch: model.components["vae"].register_to_config(act_fn="gelu"), 11, 0),
        (lambda model, patch: patch.setattr(transforms, "VERSION", 2), 11, 0),
        (lambda model, patch: patch.setattr(transforms, "_versions", lambda: ("13", "1", "1")), 11, 0),
        (lambda model, patch: nudged(model.components["unet"]), 0, 0),
    ],
    ids=["autoencoder", "text encoder", "precision", "settings", "our transform", "Pillow", "UNet"],
)
def test_what_encodes_is_part_of_the_cache(encoder_of, model, monkeypatch, change, latents, text):
    encoder_of().build()
    change(model, monkeypatch)
    again = encoder_of()
    assert (len(again.cached_latents.missing), len(again.cached_text.missing)) == (latents, text)


# -- files -------------------------------------------------------------------------------------------------------------


def in_child(work):
    """Start `work()` in a forked child; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def shards(tmp_path, kind="latents"):
    return sorted((tmp_path / "cache").glob(f"{kind}-*/[!.]*.safetensors"))


def test_what_a_killed_run_has_finished_stays(encoder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "SECONDS_AT_RISK", -1)  # a file for each image
    sync = tensor_store.content_named_file
    monkeypatch.setattr(tensor_store, "content_named_file", lambda *all: (time.sleep(0.02), sync(*all))[1])
    child = in_child(lambda: encoder_of().build())
    while len(shards(tmp_path)) < 3:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    encoder = encoder_of()
    assert 0 < len(encoder.cached_latents.missing) <= 8
    assert_equal(encoded(encoder_of("off")), encoded(encoder))


def test_an_error_in_the_middle_keeps_what_was_encoded(load, encoder_of, folder):
    images = load(**FLAGS)[0]
    encoder = encoder_of(images=images)
    assert len(encoder.cached_latents.missing) == 11
    (folder / "07.png").write_bytes(b"broken in the meantime")
    with pytest.raises(ValueError, match=r"metadata.jsonl line 8: .*07.png"):
        encoder.build()
    assert 0 < len(encoder_of(images=images).cached_latents.missing) < 11


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def rename(path):
    path.rename(path.with_stem("0" * 32))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, rename, lambda path: path.write_text("no tensors")])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_broken_file_is_named_and_made_again(encoder_of, tmp_path, damage, kind):
    encoder_of().build()
    [path] = shards(tmp_path, kind)
    damage(path)
    [broken] = shards(tmp_path, kind)
    encoder = encoder_of()
    assert_equal(encoded(encoder_of("off")), encoded(encoder))
    assert any(str(broken) in line for line in encoder.said)
    assert shards(tmp_path, kind) == [path]


def test_two_runs_may_write_the_same_at_the_same_time(encoder_of, tmp_path):
    children = [in_child(lambda: encoder_of().build()) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    encoder = encoder_of()
    assert encoder.cached_latents.missing == [] == encoder.cached_text.missing
    assert len(shards(tmp_path)) == 1  # the same content has the same name
    assert not list((tmp_path / "cache").rglob(".*"))
    assert_equal(encoded(encoder_of("off")), encoded(encoder))


def test_leftovers_go_once_nobody_can_be_writing_them(tmp_path):
    for name, age in ((".incomplete-old.safetensors", 7200), (".incomplete-new.safetensors", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with written_in_shards(tmp_path) as add:
        add(np.zeros(16, np.uint8), {"mean": torch.zeros(3)})
    assert [path.name for path in tmp_path.glob(".*")] == [".incomplete-new.safetensors"]


def test_several_processes_share_the_work_and_all_find_everything(encoder_of):
    first, second = (encoder_of().cached_latents for _ in range(2))
    for process, one in enumerate((first, second)):
        one.run.processes, one.run.process, one.run.is_main = 2, process, process == 0
    second.run.gathered = lambda _: [first.missing]
    built = {first: [], second: []}
    for one in built:
        encode = one.encoded
        one.encoded = lambda numbers, one=one, encode=encode: built[one].extend(numbers) or encode(numbers)
    first.run.wait_for_everyone = second.build  # the first one's barrier: until then the second one works
    second.run.wait_for_everyone = lambda: None
    with pytest.raises(ValueError, match="lost files"):  # one of two, whose barrier is none
        second_alone = encoder_of(folder="other").cached_latents
        second_alone.run.processes = 2
        second_alone.build()
    first.build()
    assert sorted(built[first] + built[second]) == first.missing and len(built[first]) == 6
    assert torch.equal(first.store.read(first.keys[0, 0])["mean"], second.store.read(second.keys[0, 0])["mean"])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_more_than_a_file_waits_to_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 100_000)
    wide, high = {"mean": torch.zeros(4, 32, 64)}, {"mean": torch.zeros(4, 64, 32)}  # 32,784 bytes with the key
    with written_in_shards(tmp_path) as add:
        for number in range(10):
            add(np.full(16, number, np.uint8), wide if number % 3 else high)
            assert len(list(tmp_path.glob("*.safetensors"))) >= (number - 1) // 3
    assert all(path.stat().st_size < 101_000 for path in tmp_path.glob("*.safetensors"))
    assert len(TensorStore(tmp_path).keys) == 10


def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def tensors_held():
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_what_is_read_stays_on_disk_and_tensors_are_counted_by_files_not_by_images(tmp_path):
    rows, size = 100, 16 * 64 * 64 * 4  # 26 MB
    keys = np.random.default_rng(0).integers(0, 256, (rows, 16), dtype=np.uint8)
    with written_in_shards(tmp_path) as add:
        for number in range(rows):
            add(keys[number], {"mean": torch.full((16, 64, 64), float(number))})
    gc.collect()
    before, tensors = own_memory(), tensors_held()
    store = TensorStore(tmp_path)
    for start in range(0, rows, 16):
        found = store.read(keys[start : start + 16].view(tensor_store.KEY).ravel())["mean"]
        assert found[:, 0, 0, 0].tolist() == list(range(start, start + len(found)))
    del found
    gc.collect()
    assert own_memory() - before < rows * size / 4
    assert tensors_held() - tensors < 10


# -- what leaves the device, and what is cached at all -----------------------------------------------------------------


def test_what_has_nothing_to_do_leaves_the_device_and_comes_back_to_generate(encoder_of, model, monkeypatch):
    calls = []
    for name in ("vae", "text_encoder", "unet"):
        to = lambda where, name=name: calls.append((name, str(where)))
        monkeypatch.setattr(model.components[name], "to", to)
    encoder = encoder_of()
    assert calls == []
    encoder.build()
    away = [("vae", "cpu"), ("text_encoder", "cpu")]
    assert calls == away
    model.offloaded = dict.fromkeys(model.offloaded, "the device")
    calls.clear()
    with model.loaded(), model.pipeline():  # as the evaluator does: once there and back
        assert calls == [(name, "the device") for name, _ in away]
    assert calls[2:] == away and model.offloaded == {"vae": "the device", "text_encoder": "the device"}
    calls.clear()
    with pytest.raises(ValueError, match="inside"), model.pipeline():
        raise ValueError("inside")
    assert calls == [*((name, "the device") for name, _ in away), *away]


@pytest.mark.parametrize(
    ("change", "flags", "kinds"),
    [
        (None, {}, [CachedLatents, CachedText]),
        (None, {"shuffle_tags": True}, [CachedLatents]),
        (lambda model: model.frozen_encoders.clear(), {}, [CachedLatents]),
        (lambda model: setattr(model, "codec", SimpleNamespace()), {}, [CachedText]),  # pixels
    ],
    ids=["all", "shuffled tags", "trained text encoder", "pixel space"],
)
def test_what_cannot_be_cached_is_encoded_at_every_step(encoder_of, model, change, flags, kinds):
    if change:
        change(model)
    encoder = encoder_of(**flags)
    assert list(map(type, encoder.cached)) == kinds


def test_text_of_several_tensors_and_of_several_tokenizers(encoder_of, model, monkeypatch):
    encode = model.family.encode_text

    def two(_, encoders, tokens):
        found = encode(encoders, tokens)
        return found | {"pooled": found["prompt_embeds"].mean(1).half(), "second": tokens["second"].float()}

    monkeypatch.setattr(type(model.family), "encode_text", two)
    plain = type(model.tokenize).__call__
    monkeypatch.setattr(
        type(model.tokenize), "__call__",
        lambda self, captions: (ids := plain(self, captions)) | {"second": ids["text_encoder"][:, :5] + 1},
    )  # fmt: skip
    fresh, cached = encoded(encoder_of("off")), encoded(encoder_of())
    assert_equal(fresh, cached)
    text = cached[0][2]
    assert {name: one.dtype for name, one in text.items()} == {
        "prompt_embeds": torch.float32, "pooled": torch.float16, "second": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        ({"center_crop": True}, {}, None),
        ({"center_crop": True}, {"total_steps": 3}, "1.0 epochs"),
        ({"center_crop": True, "random_flip": True}, {"total_steps": 6}, "2.0 epochs"),
        ({"cached_crops": 3}, {"total_steps": 9}, "3.0 epochs"),
        ({"cached_crops": 3}, {}, None),
        ({}, {}, "crops are random"),
        ({"center_crop": True, "random_resized_crop_scale": 0.5}, {}, "crops are random"),
        ({"center_crop": True, "check_images": "none"}, {}, "--check_images none"),
    ],
    ids=str,
)
def test_without_a_word_the_cache_is_used_where_it_saves_time(encoder_of, flags, options, said):
    encoder = encoder_of("auto", **options, **{"center_crop": False, **flags})
    assert bool(encoder.cached) != bool(said)
    assert [said in line for line in encoder.said] == ([True] if said else [])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, ["--cached_crops"]),
        ({"center_crop": True}, []),
        ({"cached_crops": 2}, []),
        ({"center_crop": True, "random_resized_crop_scale": 0.5}, ["--cached_crops"]),
        ({"cached_crops": 2, "random_resized_crop_scale": 0.5}, []),
        ({"cache_latents": "off", "random_resized_crop_scale": 0.5}, []),
        ({"cache_latents": "auto"}, []),
        ({"center_crop": True, "cache_folder": "out/cache", "output_dir": "out"}, ["--output_dir"]),
        ({"cache_latents": "auto", "cache_folder": "unused"}, ["--train_data_dir"]),
        ({"cache_latents": "auto", "cache_folder": "cache", "output_dir": "cache/out"}, []),
    ],
    ids=str,
)
def test_flags_that_the_cache_does_not_go_with_are_named(data_args, flags, named):
    problems = list(CacheArgs.problems(data_args("unused", **({"cache_latents": "on"} | flags))))
    assert len(problems) == len(named) and all(map(str.__contains__, problems, named)), problems
