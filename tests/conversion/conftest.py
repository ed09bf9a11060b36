"""Shared by the tests of finetuning/conversion: folders laid out by hand, and what a source's reader finds in them."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from finetuning.conversion.sources import SOURCES
from finetuning.data.findings import Findings
from prepare_dataset import ConvertArgs


@pytest.fixture(scope="session")
def photo():
    """An image of large soft areas and fine grain, as a photograph has; another for each seed."""

    def photo(seed, size=(48, 36)):
        rng = np.random.default_rng(seed)
        soft = Image.fromarray(rng.integers(40, 215, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (size[1], size[0], 3))
        return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))

    return photo


@pytest.fixture(scope="session")
def write_split():
    """Write rows of (file name, image or bytes or None, caption) and their metadata.jsonl."""

    def write_split(folder, *rows):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image, _ in rows:
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(image, bytes):
                (folder / name).write_bytes(image)
            elif image is not None:
                image.save(folder / name)
        lines = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, _, caption in rows]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    return write_split


@dataclass
class Reading:
    """What a source's reader found."""

    samples: list
    errors: dict  # {code: ["where (reason)", ...]}
    warnings: dict

    def __getitem__(self, name):
        (found,) = (sample for sample in self.samples if sample.name == name)
        return found

    @property
    def captions(self):
        """[(name, captions)], in the reader's order."""
        return [(sample.name, sample.captions) for sample in self.samples]

    @property
    def places(self):
        """{(split, name)}."""
        return {(sample.split, sample.name) for sample in self.samples}


@pytest.fixture(scope="session")
def read_source():
    """read_source(kind, path, flag=value, ...) -> Reading."""

    def read_source(kind, path, **flags):
        findings, (reader, _) = Findings(), SOURCES[kind]
        samples = list(reader(str(path), ConvertArgs(source=kind, path=str(path), **flags), findings))
        assert len({sample.key for sample in samples}) == len(samples)
        return Reading(samples, *findings.as_dict().values())

    return read_source


@pytest.fixture(scope="session")
def clean(read_source):
    """The Reading of a source in which nothing is wrong and nothing needs saying."""

    def clean(kind, path, **flags):
        found = read_source(kind, path, **flags)
        assert (found.errors, found.warnings) == ({}, {})
        return found

    return clean
