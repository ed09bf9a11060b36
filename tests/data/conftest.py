"""Shared by the tests of finetuning/data: the flags, the tokenizers, small folders of noise, and shards."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from transformers import CLIPTokenizer

from finetuning.data.training_set import load_images
from finetuning.families.family import Tokenizers
from finetuning.families.table import DEFAULT_FAMILY
from models.make_start import vocabulary
from train_text_to_image import Args


@pytest.fixture(scope="session")
def tokenize():
    """Captions -> {"text_encoder": ids [n, 16]}."""
    entries, merges = vocabulary()
    return Tokenizers(
        {"text_encoder": CLIPTokenizer(vocab=entries, merges=merges, model_max_length=16)}, DEFAULT_FAMILY
    )


@pytest.fixture(scope="session")
def data_args():
    """The training script's Args for a dataset."""

    def data_args(source, resolution="8", **flags):
        return Args(train_data_dir=source and str(source), resolution=resolution, **flags)

    return data_args


@pytest.fixture(scope="session")
def save_noise():
    """Save an image of noise that is shown as (height, width) `size`, stored turned as an EXIF orientation says."""

    def save_noise(path, size=(12, 12), orientation=1, seed=0):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        height, width = size if orientation < 5 else size[::-1]
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)

    return save_noise


@pytest.fixture(scope="session")
def write_metadata():
    """Write a folder's metadata.jsonl of (file name, caption)."""

    def write_metadata(folder, rows):
        lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    return write_metadata


@pytest.fixture
def folder(tmp_path, save_noise, write_metadata):
    """11 images of noise, 00.png to 10.png, captioned "circle", "circle circle", ..."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(11):
        save_noise(folder / f"{index:02d}.png", seed=index)
    write_metadata(folder, [(f"{index:02d}.png", "circle " * (index + 1)) for index in range(11)])
    return folder


@pytest.fixture
def load(folder, tokenize, data_args):
    """Load a folder with some flags: (ImageDataset, the held-out one or None, the messages)."""

    def load(seed=0, validation_fraction=0.0, source=folder, **flags):
        messages, cache = [], str(folder.parent / "cache")
        args = data_args(source, **flags)
        training, held_out = load_images(args, tokenize, seed, validation_fraction, messages.append, cache)
        return training, held_out, "\n".join(messages)

    return load


SIDEWAYS = 6  # EXIF orientation: shown turned by 90 degrees


@pytest.fixture
def load_buckets(tmp_path, load, save_noise, write_metadata):
    """Load 12 images of four sizes, every second one turned by EXIF, and a validation split alike, into buckets."""
    sizes = [(16, 16), (12, 32), (32, 12), (24, 16)]  # (height, width) as a person sees them
    folder = tmp_path / "sizes"
    for split, count in (("train", 12), ("validation", 4)):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            save_noise(folder / f"{split}/{index:02d}.png", sizes[index % 4], SIDEWAYS if index % 2 else 1)
        write_metadata(folder / split, [(f"{index:02d}.png", "circle") for index in range(count)])

    def load_buckets(**flags):
        return load(
            source=folder, resolution="16", **({"aspect_buckets": True, "bucket_step": 4, "min_side": 8} | flags)
        )

    return load_buckets


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoded():
    """The bytes of an image file, 8 x 8, of one red."""

    def encoded(red=0, kind="PNG"):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(content, kind)
        return content.getvalue()

    return encoded


@pytest.fixture(scope="session")
def write_tar():
    """Write a WebDataset shard of {name: bytes or text}."""

    def write_tar(path, files):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                content = content.encode() if isinstance(content, str) else content
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    return write_tar


@pytest.fixture(scope="session")
def write_parquet():
    """Write a Parquet file as `datasets` writes it, of (encoded image, caption)."""

    def write_parquet(path, rows, file=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"), "width": datasets.Value("int64")}
        )
        columns = {
            "image": [{"bytes": content, "path": file} for content, _ in rows],
            "text": [text for _, text in rows],
            "width": [8] * len(rows),
        }
        pq.write_table(pa.table(columns, features.arrow_schema), path)

    return write_parquet


@pytest.fixture(scope="session")
def write_shards(encoded, write_tar, write_parquet):
    """Write a folder of shards of some sizes; sample 3 of shard 2 says "2-3" and has 23 as its red."""

    def write_shards(folder, kind="tar", sizes=(3, 7, 1, 5)):
        for shard, size in enumerate(sizes):
            rows = [(encoded(10 * shard + number), f"{shard}-{number}") for number in range(size)]
            if kind == "tar":
                images = {f"{number:03}.png": content for number, (content, _) in enumerate(rows)}
                texts = {f"{number:03}.txt": text for number, (_, text) in enumerate(rows)}
                files = {name: (images | texts)[name] for name in sorted(images | texts)}
                write_tar(folder / f"{shard:05}.tar", files)
            else:
                write_parquet(folder / f"train-{shard:05}-of-{len(sizes):05}.parquet", rows)
        return folder

    return write_shards


@pytest.fixture(scope="session")
def stream_args(data_args):
    """The training script's Args for a stream."""

    def stream_args(source, **flags):
        small = {"max_train_steps": 9, "seed": 1, "train_batch_size": 2, "shuffle_buffer": 4}
        return data_args(source, streaming=True, **(small | flags))

    return stream_args
