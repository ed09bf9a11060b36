"""Features of sets of images, kept by content: an image is never computed again, and never taken for another.

The cache holds a folder for each protocol, side and weights file, which is a data.tensor_store by the images' hashes:
<cache>/clean-64-v2-<sha256 of the weights>/.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash

from finetuning.data.tensor_store import KEY, TensorStore, written_in_shards
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.networks import exact
from finetuning.evaluation.preprocessing import network_input, read_images

VERSION = 2  # to be raised when the same files would give other features than before


def features_of(paths, side, network, protocol, weights, cache_dir, batch_size, workers, device):
    """The network's features of image files, float64 [n, d]; files of the same content have the same row.

    paths      each is brought to side x side pixels by images.matched
    network    of networks.inception, on `device`; `weights` are its Weights
    protocol   one of images.PROTOCOLS
    cache_dir  where features are kept; None: nowhere
    workers    processes that read and resize; 0: this one

    Raises EvaluationError naming every image that cannot be read, or all whose features are not finite.
    """
    if not paths:
        raise EvaluationError("there are no images to take features of")
    digests, rows = {path: _digest(path) for path in paths}, {}
    cache = Path(cache_dir) / f"{protocol}-{side}-v{VERSION}-{weights.sha256}" if cache_dir else None
    if cache:
        store, every = TensorStore(cache), list(dict.fromkeys(digests.values()))
        keys = np.array(every, KEY)
        for path, why in store.damage(keys).items():
            raise EvaluationError(f"the cache of features has a broken part, delete {path}: {why}")
        if len(there := np.flatnonzero(store.find(keys) >= 0)):
            found = store.read(keys[there])["features"].numpy()
            rows = dict(zip([every[number] for number in there], found, strict=True))
    new = [path for path, digest in digests.items() if digest not in rows]
    if new:
        computed = _computed(new, side, network, protocol, batch_size, workers, device)
        fresh = {digests[path]: row for path, row in zip(new, computed, strict=True)}
        if cache:
            with written_in_shards(cache) as add:
                for digest, row in fresh.items():
                    add(np.frombuffer(digest, np.uint8), {"features": torch.from_numpy(row)})
        rows |= fresh
    return np.stack([rows[digests[path]] for path in paths]).astype(np.float64)


def _digest(path):
    """The hash of a file's bytes, or of its name where they cannot be read: opening it as an image says why."""
    try:
        return xxhash.xxh3_128_digest(Path(path).read_bytes())
    except OSError:
        return xxhash.xxh3_128_digest(os.fsencode(path))


def _computed(paths, side, network, protocol, batch_size, workers, device):
    """float32 [n, d]."""
    parts = []
    for inputs in read_images(paths, side, batch_size, workers, partial(network_input, protocol=protocol), "features"):
        with exact(device):
            parts.append(network(inputs.to(device)).float().cpu().numpy())
    features = np.concatenate(parts)
    if strange := [str(path) for path, row in zip(paths, features, strict=True) if not np.isfinite(row).all()]:
        raise EvaluationError(f"the features of {len(strange)} image(s) are not finite: {', '.join(strange)}")
    return features
