"""Features of sets of images, kept by content: an image is never computed again, and never taken for another.

The cache holds a folder for each protocol, side and weights file, and in it a folder for what was computed together:

    <cache>/clean-64-v1-<sha256 of the weights>/<hash of the images' hashes>/features.safetensors, manifest.json
"""

from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.networks import exact
from finetuning.evaluation.preprocessing import network_input, read_images
from finetuning.files import BrokenFolder, atomic_folder, check_manifest, writing

VERSION = 1  # to be raised when the same files would give other features than before
FILE = "features.safetensors"


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
    digests = {path: _digest(path) for path in paths}
    cache = Path(cache_dir) / f"{protocol}-{side}-v{VERSION}-{weights.sha256}" if cache_dir else None
    rows = _kept(cache, set(digests.values())) if cache else {}
    new = [path for path, digest in digests.items() if digest not in rows]
    if new:
        computed = _computed(new, side, network, protocol, batch_size, workers, device)
        fresh = {digests[path]: row for path, row in zip(new, computed, strict=True)}
        if cache:
            _keep(cache, fresh)
        rows |= fresh
    return np.stack([rows[digests[path]] for path in paths]).astype(np.float64)


def _digest(path):
    """The hash of a file's bytes, or the path itself where they cannot be read: opening it as an image says why."""
    try:
        return xxhash.xxh3_128_digest(Path(path).read_bytes())
    except OSError:
        return path


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


def _kept(cache, wanted):
    """{digest: float32 [d]} of what the cache has of the `wanted` digests. Raises EvaluationError."""
    found = {}
    for folder in sorted(cache.glob("[!.]*")):  # hidden ones are being written
        try:
            with safe_open(folder / FILE, "np") as stored:
                digests = [digest.tobytes() for digest in stored.get_tensor("digests")]
                rows = {digest: row for row, digest in enumerate(digests) if digest in wanted}
                if rows:
                    check_manifest(folder)
                    features = stored.get_tensor("features")
        except (OSError, SafetensorError, BrokenFolder) as error:
            raise EvaluationError(f"the cache of features has a broken part, delete {folder}: {error}") from error
        found |= {digest: features[row] for digest, row in rows.items()}
    return found


def _keep(cache, rows):
    """Writes {digest: float32 [d]} as a folder that is whole or not there."""
    digests = np.stack([np.frombuffer(digest, np.uint8) for digest in rows])
    with atomic_folder(cache / xxhash.xxh3_128_hexdigest(digests.tobytes())) as folder, writing(folder / FILE):
        save_file({"digests": digests, "features": np.stack(list(rows.values()))}, folder / FILE)
