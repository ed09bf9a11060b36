"""The networks that metrics need: FID's Inception, LPIPS and CLIP, and which weights they were given.

    network, weights = inception(None, "cpu")  # the published weights, downloaded once
    network, weights = inception("inception.safetensors", "cpu")  # or those of a file

The layers are those of torch-fidelity, lpips and transformers, in eval mode and fp32. Their own loading is not used: it
unpickles freely (torch-fidelity) or takes a file that fits only in part (lpips). A pickle is read only if it is one of
the files that were published as nothing else, Inception, AlexNet and OpenAI's CLIP, known by their sha256; and nothing
but tensors is loaded of it.
"""

import io
import os
import textwrap
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from finetuning.data.tensor_store import KEY, TensorStore, written_in_shards
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.preprocessing import network_input, read_images
from finetuning.families.folders import check_weights_files
from finetuning.families.model_args import ModelError
from finetuning.families.quiet import errors_only
from finetuning.families.tensors import first_not_finite, pickled
from finetuning.files import sha256

INCEPTION_SHA256 = "6726825d"  # of the published files: how their digests begin
ALEXNET_SHA256 = "7be5be79"
CLIP_SHA256 = "a6308213"
CLIP = "openai/clip-vit-base-patch32"
CLIP_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # as transformers prefers them
FEATURES_VERSION = 2  # to be raised when the same files would give other features than before
SMALLEST_LPIPS = 31  # pixels: AlexNet's poolings leave nothing of a smaller image
TOGETHER = 16  # images or captions that LPIPS and CLIP are given at once


class Unavailable(EvaluationError):
    """Weights that are not to be had here; the message names the flag that takes local ones."""


@dataclass(frozen=True)
class Weights:
    """Which weights a network has. published: None where it cannot be known."""

    name: str
    origin: str  # the file as it was named, or the address
    sha256: str
    published: bool | None


# -- Inception -------------------------------------------------------------------------------------------------------


def inception(weights, device):
    """(network, Weights): FID's Inception up to its 2048 features, [n, 3, 299, 299] -> [n, 2048].

    weights   a .safetensors file of torch-fidelity's (and pytorch-fid's) keys, or its published .pth; None: downloaded

    Its input is made by preprocessing.network_input; the layers are the same for all protocols. Raises
    EvaluationError; Unavailable where nothing was named and the download fails.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file = WeightsFile.located("--inception_weights", weights, URL_INCEPTION_V3, INCEPTION_SHA256)
    # The constructor unpickles what it is given: it gets bytes that were written here, of tensors alone.
    written = io.BytesIO()
    torch.save(file.state(), written)
    written.seek(0)
    with file.fitting():
        whole = FeatureExtractorInceptionV3("inception", ["2048"], written)
    layers = [layer for name, layer in whole.named_children() if name != "fc"]  # in the order of its forward
    network = nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)  # faster on a CPU
    return _still(network, device), file.facts("inception")


# -- features, kept by content: an image is never computed again, and never taken for another ------------------------


def features_of(paths, side, network, protocol, weights, cache_dir, batch_size, workers, device):
    """The network's features of image files, float64 [n, d]; files of the same content have the same row.

    paths      each is brought to side x side pixels by preprocessing.matched
    network    of networks.inception, on `device`; `weights` are its Weights
    protocol   of preprocessing.network_input
    cache_dir  where features are kept, in a data.tensor_store for each protocol, side and weights; None: nowhere
    workers    processes that read and resize; 0: this one

    Raises EvaluationError naming every image that cannot be read, or all whose features are not finite.
    """
    digests, rows = {path: _digest(path) for path in paths}, {}
    cache = Path(cache_dir) / f"{protocol}-{side}-v{FEATURES_VERSION}-{weights.sha256}" if cache_dir else None
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


# -- LPIPS -----------------------------------------------------------------------------------------------------------


def lpips_network(trunk, device):
    """(network, [Weights of the trunk, Weights of the heads]): the lpips package's LPIPS on AlexNet, version 0.1.

    trunk  a .safetensors file of torchvision's AlexNet, or its published .pth; None: torchvision's download. The heads
           lie in the package.

    Raises EvaluationError; Unavailable where nothing was named and the download fails.
    """
    import lpips
    from torchvision.models import AlexNet_Weights

    trunk = WeightsFile.located("--lpips_trunk", trunk, AlexNet_Weights.IMAGENET1K_V1.url, ALEXNET_SHA256)
    heads = Path(lpips.__file__).parent / "weights/v0.1/alex.pth"
    heads = WeightsFile("the lpips package's", heads, f"lpips {version('lpips')}", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in a way that is no longer liked
        network = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    slices = [getattr(network.net, f"slice{number}") for number in range(1, network.net.N_slices + 1)]
    features = nn.Sequential(*(layer for part in slices for layer in part))  # numbered as in torchvision
    with trunk.fitting():
        convolutions = {name: value for name, value in trunk.state().items() if not name.startswith("classifier.")}
        nn.ModuleDict({"features": features}).load_state_dict(convolutions)
    with heads.fitting():
        own = {f"lin{number}": head for number, head in enumerate(network.lins)}
        nn.ModuleDict(own).load_state_dict(heads.state())
    return _still(network, device), [trunk.facts("lpips trunk (AlexNet)"), heads.facts("lpips heads")]


def lpips_of(network, images_a, images_b):
    """LPIPS of each pair of images, float64 [n]: PIL RGB images or uint8 arrays, all of one size of SMALLEST_LPIPS."""
    a, b = (np.stack([np.asarray(image) for image in images]) for images in (images_a, images_b))
    device = next(network.parameters()).device
    distances = []
    with exact(device):
        for start in range(0, len(a), TOGETHER):
            # [n, 3, height, width] in -1..1, rounded as lpips.im2tensor does
            pair = (torch.from_numpy(pixels[start : start + TOGETHER] / 127.5 - 1).float() for pixels in (a, b))
            pair = (planes.permute(0, 3, 1, 2).contiguous().to(device) for planes in pair)
            distances.append(network(*pair).flatten().double().cpu())
    return torch.cat(distances).numpy()


# -- CLIP ------------------------------------------------------------------------------------------------------------


def clip(model, device):
    """(ClipScorer, Weights) of a CLIPModel: a folder, or a name on the Hub.

    Raises EvaluationError; Unavailable where it is the default, which cannot be had from the Hub.
    """
    import transformers

    folder, published = Path(model), None
    if not folder.is_dir():
        folder, published = _from_hub(model), (True if model == CLIP else None)
    files = _clip_files(folder, model)
    try:
        with errors_only():
            processor = transformers.CLIPProcessor.from_pretrained(folder)
            network, loading = transformers.CLIPModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # on broken folders the libraries also raise AttributeError, TypeError, ...
        raise EvaluationError(f"--clip_model {model} cannot be opened as a CLIPModel: {error}") from error
    if lost := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
        raise EvaluationError(
            f"--clip_model {model} lacks {len(lost)} weights of a CLIPModel ({', '.join(lost[:3])} ...): it is not "
            "whole, or another kind of model"
        )
    if key := first_not_finite(network.state_dict()):
        raise EvaluationError(f"--clip_model {model} holds NaN or infinite values ({key})")
    digests = ", ".join(map(sha256, files))
    return ClipScorer(_still(network, device), processor), Weights("clip", str(model), digests, published)


class ClipScorer:
    """Images and captions as unit vectors of one space; their products are cosines.

    truncated  how many captions, each counted once, were longer than the text encoder reads and lost their end
    """

    def __init__(self, network, processor):
        self.network, self.processor = network, processor
        self.longest = network.config.text_config.max_position_embeddings
        self._cut = set()

    @property
    def truncated(self):
        return len(self._cut)

    def images(self, images):
        """PIL RGB images -> float64 [n, d]."""
        prepare = lambda some: self.processor.image_processor(images=some, return_tensors="pt")
        return self._vectors(self.network.get_image_features, prepare, images)

    def texts(self, captions):
        """Captions -> float64 [n, d]."""
        tokenizer = self.processor.tokenizer
        with errors_only():
            lengths = map(len, tokenizer(list(captions))["input_ids"])
        self._cut |= {caption for caption, length in zip(captions, lengths, strict=True) if length > self.longest}
        prepare = lambda some: tokenizer(
            some, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return self._vectors(self.network.get_text_features, prepare, captions)

    def _vectors(self, features, prepare, items):
        device = next(self.network.parameters()).device
        with exact(device):
            parts = [
                features(**prepare(list(items[start : start + TOGETHER])).to(device)).pooler_output.double().cpu()
                for start in range(0, len(items), TOGETHER)
            ]
        return nn.functional.normalize(torch.cat(parts)).numpy()


def _from_hub(name):
    """The folder of a Hub model's files; the default's pickle is fetched where there are no safetensors."""
    import huggingface_hub

    try:
        for weights in ("*.safetensors", *(["pytorch_model.bin"] if name == CLIP else [])):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.txt", weights]))
            if any((folder / file).is_file() for file in CLIP_FILES):
                return folder
        reason = "it has no safetensors"
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
    kind = Unavailable if name == CLIP else EvaluationError  # what was named must be there
    raise kind(f"--clip_model {name} cannot be had from the Hub, name a folder: {reason}")


def _clip_files(folder, model):
    """The files that hold the weights. Raises EvaluationError."""
    for name in CLIP_FILES:
        if (folder / name).is_file():
            files = sorted(folder.glob("model-*.safetensors")) if name.endswith(".json") else [folder / name]
            try:
                if not (files[0].suffix == ".bin" and sha256(files[0]).startswith(CLIP_SHA256)):
                    check_weights_files(folder)
            except ModelError as error:
                raise EvaluationError(f"--clip_model {error}") from error
            return files
    raise EvaluationError(f"--clip_model {model} has no weights: {', '.join(CLIP_FILES)}")


# -- loading ---------------------------------------------------------------------------------------------------------


@contextmanager
def exact(device):
    """No gradients, and fp32 whatever the run's precision is: no autocast, no TF32."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(torch.device(device).type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(products)


def _still(network, device):
    return network.float().eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and the flag that takes it.

    origin     the file as it was named, or the address
    published  how the sha256 of the published file begins
    """

    flag: str
    path: Path
    origin: str
    published: str

    @classmethod
    def located(cls, flag, given, url, published):
        """The file that was named, or the library's download, which is kept in torch.hub's folder."""
        if given:
            if not Path(given).is_file():
                raise EvaluationError(f"{flag} {given}: there is no such file")
            return cls(flag, Path(given), str(given), published)
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        if not path.is_file():
            _download(url, path, published, flag)
        if not sha256(path).startswith(published):
            raise EvaluationError(f"{path} is not the published file (sha256 {published}...): delete it, or use {flag}")
        return cls(flag, path, url, published)

    def state(self):
        """{name: tensor}, on the CPU: of safetensors, or of the published pickle. Raises EvaluationError."""
        is_safe = self.path.suffix == ".safetensors"
        if not (is_safe or sha256(self.path).startswith(self.published)):
            raise EvaluationError(f"{self.flag} {pickled(self.path)}")
        try:
            state = load_file(self.path) if is_safe else torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # on broken files the libraries raise more than OSError
            reason = f"cannot be read as a file of tensors alone: {textwrap.shorten(str(error), 300)}"
            raise EvaluationError(f"{self.flag} {self.path} {reason}") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise EvaluationError(f"{self.flag} {self.path} is not a state dict, a mapping of names to tensors")
        if broken := first_not_finite(state):
            raise EvaluationError(f"{self.flag} {self.path} has weights that are not finite: {broken}")
        return state

    @contextmanager
    def fitting(self):
        """Turns the message of a strict load into one that names the file, with the keys that do not fit."""
        try:
            yield
        except RuntimeError as error:
            lines = [textwrap.shorten(line, 300) for line in str(error).splitlines()[1:6]]
            told = f"{self.flag} {self.path} does not fit the network:"
            raise EvaluationError("\n  ".join([told, *lines])) from error

    def facts(self, name):
        """Its Weights."""
        digest = sha256(self.path)
        return Weights(name, self.origin, digest, digest.startswith(self.published))


def _download(url, path, digest, flag):
    from huggingface_hub.constants import HF_HUB_OFFLINE

    help = f"name a local file with {flag}, or put it at {path}"
    if HF_HUB_OFFLINE:
        raise Unavailable(f"{url} is not on this machine and HF_HUB_OFFLINE is set: {help}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, digest, progress=False)
    except (OSError, RuntimeError) as error:  # no connection; another file than expected
        raise Unavailable(f"{url} cannot be downloaded ({error}): {help}") from error
