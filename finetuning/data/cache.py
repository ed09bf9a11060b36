"""Batch -> latents and conditioning: encoded at every step, or once and kept in a cache on disk that runs share.

    CACHE/latents-IDENTITY-float32-cpu/    mean and std of each image's posterior as it is cut, and the sizes
    CACHE/text-IDENTITY-float32-cpu/       what the text encoders make of each caption, dropped ones too

The kind's name says what encoded it, the key all that was encoded: the bytes of the image file, how it is cut, the
token ids. So nothing has to be declared stale; an image that is edited, re-encoded or cut otherwise has another key,
and one that was only renamed has the same. Every step still draws its own sample of the posterior.

On a CPU a row's last bits depend on how many are encoded together. The cache encodes each row alone, and so does a run
that could have used it, so that both train the same; other runs encode whole batches.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from finetuning.cli import UserError, flag
from finetuning.data.captions import possible_captions
from finetuning.data.tensor_store import KEY, TensorStore, as_bytes, digest, written_in_shards
from finetuning.data.threads import in_order
from finetuning.rng import gaussian, sent


@dataclass
class CacheArgs:
    """Cache"""

    cache_latents: str = flag(
        "auto", "encode each image and caption once, before the first step, and keep that on disk; crops must be fixed "
        "by --center_crop or --cached_crops; auto: where they are, and it saves time, and the disk has room",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    cache_folder: str | None = flag(
        None, "where, shared between runs, to be deleted at will (none: $FINETUNING_CACHE, or ~/.cache/finetuning)",
        affects_result=False,
    )  # fmt: skip

    def problems(self):
        if self.cache_folder:
            folder = Path(self.cache_folder).resolve()
            for name in ("output_dir", "train_data_dir", "prior_data_dir"):
                other = getattr(self, name, None)
                if other and Path(other).resolve() in (folder, *folder.parents):
                    yield f"--cache_folder {self.cache_folder} lies in --{name} {other}: name a folder outside of it"
        if self.cache_latents != "on":
            return
        if getattr(self, "streaming", False):
            yield "--cache_latents needs a dataset that is known as a whole, which --streaming does not: leave it out"
        elif not (self.cached_crops or (self.center_crop and self.random_resized_crop_scale is None)):
            yield "--cache_latents needs crops that are fixed: add --cached_crops 4, or --center_crop alone"


def folder_of(args):
    """The folder that the flags name."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finetuning"
    return Path(args.cache_folder or os.environ.get("FINETUNING_CACHE") or home).expanduser()


def build_encoder(args, run, model, data):
    """The Encoder that the flags ask for; `data` is a data.loading.TrainingData. Nothing is encoded yet."""
    images = data.training
    fixed = not args.streaming and bool(images.transform.different_crops)
    encoder = Encoder(model, args.seed, alone=fixed and run.device.type == "cpu")
    if args.cache_latents == "off":
        return encoder
    if args.cache_latents == "auto" and (why_not := _not_worth_it(args, data, fixed)):
        run.say(f"cache: off, {why_not}")
        return encoder
    place = lambda *facts: folder_of(args) / "-".join([*facts, run.device.type])
    if getattr(model.codec, "identity", None):
        precision = str(model.codec.dtype).removeprefix("torch.")
        folder = place("latents", model.codec.identity, precision)
        encoder.cached_latents = CachedLatents(run, model, images, folder, args.seed)
    if model.frozen_encoders and not args.shuffle_tags:
        encoder.cached_text = CachedText(run, model, images, place("text", model.text_identity))
    return encoder


def _not_worth_it(args, data, fixed):
    """Why the cache is not used without being asked for, in words; empty where it is."""
    if args.streaming:
        return "a stream is read as it comes"
    if not fixed:
        return "crops are random (--center_crop or --cached_crops N would fix them)"
    if args.check_images == "none":
        return "--check_images none opens no image before its turn"
    ways = data.training.transform.different_crops * (1 + args.random_flip)
    epochs = data.total_steps / data.batch_sampler.steps_per_epoch
    return f"{epochs:.1f} epochs do not pay for {ways} encodings of each image" if epochs <= ways else ""


def sampled(model, mean, std, seed, batch):
    """A sample of each row's posterior, drawn from (seed, step, row), scaled to unit variance."""
    noise = sent(gaussian(seed, "posterior", batch.step, batch.rows, mean.shape[1:]), mean.device)
    return model.codec.scale(mean + std * noise)


class Encoder:
    """Batch -> (latents [n, c, h, w], what else the denoiser is called with); nothing of it is trained.

    Encodes at every step what no cache holds. `alone`: each row by itself.
    """

    def __init__(self, model, seed, alone=False):
        self.model, self.seed, self.alone = model, seed, alone
        self.cached_latents = self.cached_text = None

    def __call__(self, batch):
        # latents first: cached ones bring the sizes that the family's extras are made of
        latents = self.cached_latents(batch) if self.cached_latents else self._latents(batch)
        text = self.cached_text(batch) if self.cached_text else self._text(batch)
        return self.model.condition(batch, latents, self.seed, text)

    def _latents(self, batch):
        encode = lambda tensors: dict(zip(("mean", "std"), self.model.codec.posterior(tensors["pixels"]), strict=True))
        return sampled(self.model, **self._encoded(encode, {"pixels": batch.pixels}), seed=self.seed, batch=batch)

    def _text(self, batch):
        """{name: [n, ...]}, by the frozen text encoders; None where they are trained."""
        return self._encoded(self.model.encode_text, batch.tokens) if self.model.frozen_encoders else None

    def _encoded(self, encode, tensors):
        """encode({name: [n, ...]}) -> {name: [n, ...]}, perhaps row by row."""
        if not self.alone:
            return encode(tensors)
        count = len(next(iter(tensors.values())))
        rows = [encode({name: one[row : row + 1] for name, one in tensors.items()}) for row in range(count)]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @property
    def cached(self):
        """What is kept on disk: latents, text, both or neither."""
        return [one for one in (self.cached_latents, self.cached_text) if one]

    @property
    def bytes_needed(self):
        """What has to be encoded yet, on disk. The first call reads every image file and hashes it."""
        return sum(one.bytes_needed for one in self.cached)

    def turn_off(self):
        """Encode at every step after all."""
        self.cached_latents = self.cached_text = None

    def build(self):
        """Encode what the cache lacks, and let what has then nothing to do leave the device."""
        for one in self.cached:
            one.build()


# -- cached ------------------------------------------------------------------------------------------------------------


class Cached:
    """Encodings of one kind. Subclasses have

    keys     [...] of KEY: all that this run will ask for; empty ones are not used
    encoded  ([numbers in `wanted`]) yields (number, {name: tensor on the CPU})
    entry_bytes  ([numbers in `wanted`]) their size on disk
    finish   () what follows once all are there
    """

    def __init__(self, run, model, images, folder):
        self.run, self.model, self.images, self.folder = run, model, images, folder

    @cached_property
    def missing(self):
        """[numbers in `wanted`] that are not on disk. The main process looks, so that all agree. Finds besides

        wanted   the different keys, [m] of KEY: the same image under two names is encoded once
        first    where each of them stands in `keys`, flattened: int64 [m]
        """
        keys = self.keys.ravel()  # on all processes, which share the hashing out
        used = np.flatnonzero(keys != b"")
        self.wanted, first = np.unique(keys[used], return_index=True)
        self.first = used[first]
        return self.run.gathered([self._look(self.wanted)] if self.run.is_main else [])[0]

    def _look(self, wanted):
        store = TensorStore(self.folder)
        if broken := store.damage(wanted):
            for path, reason in broken.items():
                self.run.say(f"cache: {path} is broken ({reason}): deleted, and what it held is encoded again")
                path.unlink(missing_ok=True)
            store = TensorStore(self.folder)
        return np.flatnonzero(store.find(wanted) < 0).tolist()

    @property
    def bytes_needed(self):
        return self.entry_bytes(self.missing) if self.missing else 0

    def build(self):
        run = self.run
        own = self.missing[run.process :: run.processes]
        keys = as_bytes(self.wanted)
        bar = tqdm(
            self.encoded(own), f"encoding {self.what} once", len(own), leave=False, delay=2, disable=not run.is_main
        )
        with written_in_shards(self.folder) as add:
            for number, tensors in bar:
                add(keys[number], tensors)
        run.wait_for_everyone()
        self.store = TensorStore(self.folder)
        if (self.store.find(self.wanted) < 0).any():
            raise UserError(f"{self.folder} has lost files while it was written to: start again")
        if self.missing:
            run.say(f"cache: {len(self.missing)} of {len(self.wanted)} {self.what} encoded, kept in {self.folder}")
        self.finish()


class CachedLatents(Cached):
    """Batch -> latents, of the posteriors of all images as the run cuts them; no image is opened while training."""

    what = "images"

    def __init__(self, run, model, images, folder, seed):
        super().__init__(run, model, images, folder)
        self.seed = seed

    @cached_property
    def keys(self):
        """[crops, 2, rows] of KEY: each crop of each row as it is and mirrored."""
        images, rows = self.images, range(len(self.images))
        bar = lambda own: tqdm(own, "hashing images", leave=False, delay=2, disable=not self.run.is_main)
        found = self.run.shared(rows, lambda own: [content for _, content in in_order(images.content, bar(own))])
        keys = np.zeros((images.transform.different_crops, 2, len(rows)), KEY)
        for row, content in enumerate(found):
            transform = images.transform_of(row)
            for crop in range(len(keys)):
                for draw in images.draws(crop, row):
                    keys[crop, int(draw.flip), row] = digest(content, *transform.facts(draw))
        return keys

    def entry_bytes(self, numbers):
        codec, moments = self.model.codec, 0
        for row in np.unravel_index(self.first[numbers], self.keys.shape)[2]:
            height, width = self.images.sizes[row]
            moments += 2 * codec.channels * (height // codec.factor) * (width // codec.factor)
        return moments * codec.dtype.itemsize + len(numbers) * 64

    def encoded(self, numbers):
        images, codec, of_row = self.images, self.model.codec, defaultdict(list)
        for number in numbers:
            crop, flip, row = map(int, np.unravel_index(self.first[number], self.keys.shape))
            of_row[row].append((number, next(draw for draw in images.draws(crop, row) if draw.flip == bool(flip))))

        def cut(row):
            image, transform = images.image(row), images.transform_of(row)
            return [(number, *transform.apply(image, draw)) for number, draw in of_row[row]]

        for _, cuts in in_order(cut, of_row):
            for number, pixels, sizes in cuts:
                mean, std = (one[0].to("cpu", codec.dtype) for one in codec.posterior(pixels[None].to(self.run.device)))
                yield number, {"mean": mean, "std": std, "sizes": torch.tensor(sizes)}

    def finish(self):
        self.images.skip_pixels = True
        self.model.offload(self.model.codec_components)

    def __call__(self, batch):
        images, device = self.images, batch.weights.device
        flips = [int(images.is_mirrored(row, batch.epoch)) for row in batch.rows]
        found = self.store.read(self.keys[images.transform.crop_of(batch.epoch), flips, batch.rows])
        found = {name: sent(one, device) for name, one in found.items()}
        batch.sizes = found["sizes"]
        return sampled(self.model, found["mean"].float(), found["std"].float(), self.seed, batch)


class CachedText(Cached):
    """Batch -> {name: [n, ...]}, of all captions that the run can draw."""

    what = "captions"

    @cached_property
    def captions(self):
        """All captions that the run can draw."""
        images, found = self.images, {""} if self.images.args.proportion_empty_prompts else set()
        for row in images.rows:
            found |= possible_captions(row.captions, images.may_flip(row), images.args)
        return sorted(found)

    @cached_property
    def keys(self):
        """[captions] of KEY: of their token ids."""
        found = []
        for start in range(0, len(self.captions), 1000):
            tokens = sorted(self.model.tokenize(self.captions[start : start + 1000]).items())
            ids = zip(*(one.tolist() for _, one in tokens), strict=True)
            found += [digest([name for name, _ in tokens], one) for one in ids]
        return np.array(found, KEY)

    def _encoded(self, text):
        tokens = {name: ids.to(self.run.device) for name, ids in self.model.tokenize([text]).items()}
        return {name: one[0].cpu() for name, one in self.model.encode_text(tokens).items()}

    def entry_bytes(self, numbers):
        one = self._encoded("")
        return len(numbers) * (16 + sum(tensor.nbytes for tensor in one.values()))

    def encoded(self, numbers):
        for number in numbers:
            yield number, self._encoded(self.captions[self.first[number]])

    def finish(self):
        order = np.argsort(texts := np.array([digest(text) for text in self.captions], KEY))
        self.texts, self.keys = texts[order], self.keys[order]
        del self.captions
        self.model.offload(self.model.frozen_encoders)

    def __call__(self, batch):
        texts = np.array([digest(text) for text in batch.captions], KEY)
        found = self.store.read(self.keys[np.searchsorted(self.texts, texts)])
        return {name: sent(one, batch.weights.device) for name, one in found.items()}
