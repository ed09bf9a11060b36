"""Shared by the tests of finetuning/conversion: folders laid out by hand, and what a source's reader finds in them."""

import io
import json
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from finetuning.conversion.sources import SOURCES
from finetuning.data.findings import Findings
from prepare_dataset import ConvertArgs


def content(value):
    """The bytes of a file: bytes, text, the red of an image of 4 x 4, an image, or a record for JSON."""
    if isinstance(value, int):
        value = Image.new("RGB", (4, 4), (value, 0, 0))
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    if isinstance(value, dict | list):
        value = json.dumps(value)
    return value.encode() if isinstance(value, str) else value


@pytest.fixture(scope="session")
def lay():
    """Write {name: content} below a folder, which is returned; a list of names: an image each."""

    def lay(root, files):
        root.mkdir(parents=True, exist_ok=True)
        for name, value in (files if isinstance(files, dict) else dict.fromkeys(files, 0)).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content(value))
        return root

    return lay


@pytest.fixture(scope="session")
def pack():
    """Write a tar of {name: content}; its path."""

    def pack(path, files, mode="w", **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode, **options) as tar:
            for name, value in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content(value))
                tar.addfile(entry, io.BytesIO(content(value)))
        return path

    return pack


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
    """Write a split: its images {file name: (image, bytes or None, caption)}, and their metadata.jsonl."""

    def write_split(folder, rows):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (image, _) in rows.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(image, bytes):
                (folder / name).write_bytes(image)
            elif image is not None:
                image.save(folder / name)
        lines = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, (_, caption) in rows.items()]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    return write_split


def lines_of(path):
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def lines():
    """The records of a file of JSON lines."""
    return lines_of


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
