"""Rows of tensors by key, in a folder of safetensors that any number of runs read and write.

    FOLDER/HASH.safetensors    keys [n, 16] uint8, and any other tensors [n, ...]: all rows of a file have one layout

A file is named by the hash of its content and appears whole: a killed run leaves what it had finished, and two runs
that write the same do not disturb each other. Reading maps the files into memory; what is held are the keys.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from finetuning.files import content_named_file, xxh3

KEY = "S16"  # numpy's type of a key. Never take one out of its array: numpy cuts zeros off its end
SHARD_BYTES = 512_000_000
SECONDS_AT_RISK = 120  # what a kill costs at most


def digest(*facts):
    """The key [16 bytes] of whatever has a repr."""
    import xxhash

    return xxhash.xxh3_128(repr(facts).encode()).digest()


def as_bytes(keys):
    """uint8 [n, 16] of keys [n]."""
    return np.ascontiguousarray(keys, KEY).view(np.uint8).reshape(-1, 16)


class TensorStore:
    """What the folder holds now; files that cannot be opened are in `broken`, {path: why}."""

    def __init__(self, folder):
        from safetensors import SafetensorError
        from safetensors.torch import load_file  # maps the file: tensors are read where they are touched

        self.paths, self.shards, self.broken = [], [], {}
        for path in sorted(Path(folder).glob("[!.]*.safetensors")):
            try:
                tensors = load_file(path)
                if tensors["keys"].shape[1:] != (16,) or any(
                    len(one) != len(tensors["keys"]) for one in tensors.values()
                ):
                    raise ValueError("it is not a shard of this store")
            except FileNotFoundError:  # another run has just deleted it
                continue
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                self.broken[path] = str(error)
                continue
            self.paths.append(path)
            self.shards.append(tensors)
        self.starts = np.cumsum([0, *(len(shard["keys"]) for shard in self.shards)])
        keys = np.concatenate([shard["keys"].numpy() for shard in self.shards] or [np.zeros((0, 16), np.uint8)])
        keys = keys.view(KEY).ravel()
        self.places = np.argsort(keys, kind="stable")
        self.keys = keys[self.places]

    def find(self, keys):
        """Where each of keys [n] stands among all rows, int64 [n]; -1: nowhere."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        nearest = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[nearest] == keys, self.places[nearest], -1)

    def read(self, keys):
        """{name: [n, ...]} of keys [n] that are all there and have one layout."""
        places = self.find(keys)
        numbers = np.searchsorted(self.starts, places, "right") - 1
        pairs = zip(numbers.tolist(), (places - self.starts[numbers]).tolist(), strict=True)
        rows = [(self.shards[number], row) for number, row in pairs]
        names = [name for name in rows[0][0] if name != "keys"]
        return {name: torch.stack([shard[name][row] for shard, row in rows]) for name in names}

    def damage(self, keys):
        """{path: why} of what cannot be opened, and of files with any of these keys whose content is another than it
        was: those are read to their end."""
        places = self.find(keys)
        used = np.unique(np.searchsorted(self.starts, places[places >= 0], "right") - 1)
        changed = [path for path in (self.paths[number] for number in used) if xxh3(path) != path.stem]
        return self.broken | dict.fromkeys(changed, "its content has changed since it was written")


@contextmanager
def written_in_shards(folder):
    """Yield add(key uint8 [16], {name: tensor on the CPU}); what was added is on disk on leaving, even by an error."""
    waiting, since = defaultdict(list), time.monotonic()

    def write(layout):
        from safetensors.torch import save_file

        keys, rows = zip(*waiting.pop(layout), strict=True)
        tensors = {name: torch.stack([row[name] for row in rows]) for name, _, _ in layout}
        with content_named_file(folder, ".safetensors") as path:
            save_file({"keys": torch.from_numpy(np.stack(keys))} | tensors, path)

    def size(layout):
        return len(waiting[layout]) * (16 + sum(shape.numel() * dtype.itemsize for _, dtype, shape in layout))

    def add(key, tensors):
        nonlocal since
        layout = tuple((name, one.dtype, one.shape) for name, one in sorted(tensors.items()))
        waiting[layout].append((key, tensors))
        if time.monotonic() - since > SECONDS_AT_RISK:
            since = time.monotonic()
            write_all()
        elif sum(map(size, waiting)) >= SHARD_BYTES - size(layout) // len(waiting[layout]):
            write(max(waiting, key=size))

    def write_all():
        for layout in list(waiting):
            write(layout)

    try:
        yield add
    finally:
        write_all()
