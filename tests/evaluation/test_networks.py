"""The networks give the figures of the tools that they come from, whatever the weights, and load nothing half."""

import hashlib
import shutil
from pathlib import Path

import huggingface_hub
import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import AlexNet_Weights
from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel

from finetuning.evaluation import networks
from finetuning.evaluation.metrics import EvaluationError
from finetuning.evaluation.networks import Unavailable, clip, inception, lpips_network, lpips_of

CAPTIONS = ["a red circle", "a blue square on a gray background"]
LONG = "a small red circle to the left of a large blue square on a gray background " * 3
LAYERS = (0, 3, 6, 8, 10)  # AlexNet's convolutions


class Anything:
    """What a pickle may hold besides tensors."""


def noise(side, count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def saved(state, path):
    """A path with the state dict in the format that its suffix names."""
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def trunk_state(metric_weights):
    """AlexNet's convolutions, and a stand-in for the classifier, which LPIPS does without."""
    return {"classifier.6.weight": torch.zeros(2, 2), **load_file(metric_weights / "alexnet.safetensors")}


@pytest.fixture(scope="module")
def trunk_file(trunk_state, tmp_path_factory):
    return saved(trunk_state, tmp_path_factory.mktemp("trunk") / "alexnet.safetensors")


@pytest.fixture(scope="module")
def lpips_pair(trunk_file):
    return lpips_network(trunk_file, "cpu")


@pytest.fixture(scope="module")
def clip_folder(metric_weights):
    return metric_weights / "clip"


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """torch.hub's folder of downloads, with nothing in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


# -- Inception -------------------------------------------------------------------------------------------------------


def test_published_weights_are_known_by_their_digest_and_the_network_stands_still(
    metric_weights, empty_hub, monkeypatch
):
    empty_hub.mkdir(parents=True)
    kept = empty_hub / Path(URL_INCEPTION_V3).name
    shutil.copyfile(metric_weights / "inception.pth", kept)
    with pytest.raises(EvaluationError, match=f"{kept} is not the published file.*--inception_weights"):
        inception(None, "cpu")
    monkeypatch.setattr(networks, "INCEPTION_SHA256", digest(kept)[:8])
    network, weights = inception(None, "cpu")
    assert (weights.origin, weights.published) == (URL_INCEPTION_V3, True)
    assert not any(part.training for part in network.modules())
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}


# -- files that do not fit -------------------------------------------------------------------------------------------

OPENERS = {
    "--inception_weights": lambda path: inception(path, "cpu"),
    "--lpips_trunk": lambda path: lpips_network(path, "cpu"),
}


@pytest.fixture
def any_is_published(monkeypatch):
    """Every pickle counts as the published one."""
    for name in ("INCEPTION_SHA256", "ALEXNET_SHA256", "CLIP_SHA256"):
        monkeypatch.setattr(networks, name, "")


@pytest.mark.parametrize("flag", OPENERS)
def test_offline_the_flag_for_local_weights_is_named(flag, empty_hub):
    with pytest.raises(Unavailable, match=f"HF_HUB_OFFLINE is set: name a local file with {flag}"):
        OPENERS[flag](None)


@pytest.mark.parametrize("flag", OPENERS)
@pytest.mark.parametrize(("name", "content", "told"), [
    ("gone.pth", None, "there is no such file"),
    ("object.pth", {"a": Anything()}, "cannot be read as a file of tensors alone"),
    ("text.safetensors", b"text", "cannot be read as a file of tensors alone"),
    ("empty.pth", b"", "cannot be read as a file of tensors alone"),
    ("list.pth", [torch.zeros(1)], "is not a state dict"),
    ("nested.pth", {"state_dict": {"a": torch.zeros(1)}}, "is not a state dict"),
    ("nan.pth", {"good": torch.zeros(2), "bad": torch.tensor([0, np.nan])}, "not finite: bad"),
    ("other.pth", {"conv.weight": torch.zeros(2)}, "does not fit the network"),
], ids=lambda value: value if isinstance(value, str) and "." in value else "")  # fmt: skip
def test_a_file_that_is_no_set_of_weights_is_named(flag, name, content, told, tmp_path, any_is_published):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(EvaluationError, match=told) as problem:
        OPENERS[flag](path)
    assert str(problem.value).startswith(f"{flag} {path}")


def test_of_a_published_pickle_nothing_but_tensors_is_loaded(tmp_path, any_is_published):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(EvaluationError, match="tensors alone"):
        inception(tmp_path / "harm.pth", "cpu")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("flag", [*OPENERS, "--clip_model"])
def test_a_pickle_that_was_not_published_is_refused_with_the_command_that_converts_it(flag, pickled_clip):
    folder = pickled_clip({"a": torch.zeros(1)})
    openers = OPENERS | {"--clip_model": lambda path: clip(path.parent, "cpu")}
    with pytest.raises(EvaluationError, match="weights_only=True") as problem:
        openers[flag](folder / "pytorch_model.bin")
    assert str(problem.value).startswith(f"{flag} {folder / 'pytorch_model.bin'} is a pickle")


def test_keys_that_do_not_fit_are_listed(trunk_state, tmp_path):
    wrong = {**trunk_state, "extra.bias": torch.zeros(2), "features.8.bias": torch.zeros(3)}
    del wrong["features.3.weight"]
    with pytest.raises(EvaluationError) as problem:
        lpips_network(saved(wrong, tmp_path / "wrong.safetensors"), "cpu")
    assert all(name in str(problem.value) for name in ("features.3.weight", "extra.bias", "features.8.bias"))
    assert "classifier" not in str(problem.value)


# -- LPIPS -----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_downloaded_to_the_librarys_place(trunk_state, empty_hub, tmp_path, monkeypatch):
    asked, url = [], AlexNet_Weights.IMAGENET1K_V1.url
    published = saved(trunk_state, tmp_path / "published.pth")

    def download(url, path, prefix, progress):
        asked.append((url, prefix))
        Path(path).write_bytes(published.read_bytes())

    start = digest(published)[:8]
    monkeypatch.setattr(networks, "ALEXNET_SHA256", start)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    trunk, _ = lpips_network(None, "cpu")[1]
    assert (trunk.origin, trunk.published) == (url, True)
    assert asked == [(url, start)]
    assert [path.name for path in empty_hub.iterdir()] == [Path(url).name]


def test_a_download_that_fails_is_unavailable(empty_hub, monkeypatch):
    def download(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(Unavailable, match=r"no route.*--lpips_trunk"):
        lpips_network(None, "cpu")


def test_lpips_is_that_of_the_package(lpips_pair, trunk_state):
    peer = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for number, index in enumerate(LAYERS, 1):
        layer = getattr(peer.net, f"slice{number}").get_submodule(str(index))
        layer.load_state_dict({name: trunk_state[f"features.{index}.{name}"] for name in ("weight", "bias")})
    a, b = noise(64, 3, 1), noise(64, 3, 2)
    tensors = (torch.cat([lpips.im2tensor(image) for image in images]) for images in (a, b))
    with torch.no_grad():
        wanted = peer(*tensors).flatten().double().numpy()
    found = lpips_of(lpips_pair[0], [Image.fromarray(image) for image in a], b)
    assert found.dtype == np.float64 and wanted.min() > 0.01
    assert np.array_equal(found, wanted)


def test_lpips_is_not_rounded_by_the_runs_precision(lpips_pair):
    a, b = noise(32, 2, 1), noise(32, 2, 2)
    plain = lpips_of(lpips_pair[0], a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(lpips_of(lpips_pair[0], a, b), plain)


def test_the_digests_of_trunk_and_heads_are_told(lpips_pair, trunk_file, monkeypatch):
    trunk, heads = lpips_pair[1]
    assert (trunk.origin, trunk.sha256, trunk.published) == (str(trunk_file), digest(trunk_file), False)
    assert heads.sha256 == digest(Path(lpips.__file__).parent / "weights/v0.1/alex.pth") and heads.published
    monkeypatch.setattr(networks, "ALEXNET_SHA256", digest(trunk_file)[:8])
    assert lpips_network(trunk_file, "cpu")[1][0].published


# -- CLIP ------------------------------------------------------------------------------------------------------------


def test_cosines_are_clips_own(clip_folder):
    photos = [Image.fromarray(one) for one in noise(24, 3)]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        out = model(**processor(text=CAPTIONS, images=photos, return_tensors="pt", padding=True))
    wanted = (out.logits_per_image / model.logit_scale.exp()).detach().numpy()
    scorer, _ = clip(clip_folder, "cpu")
    images, texts = scorer.images(photos), scorer.texts(CAPTIONS)
    assert images.shape == (3, 8) and texts.shape == (2, 8) and images.dtype == texts.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, rtol=1e-12)
    assert wanted.std() > 0.001
    np.testing.assert_allclose(images @ texts.T, wanted, atol=1e-6)
    assert scorer.truncated == 0


def test_a_score_does_not_depend_on_what_stands_beside_it(clip_folder, monkeypatch):
    scorer, _ = clip(clip_folder, "cpu")
    photos = [Image.fromarray(one) for one in noise(24, 5)]
    captions = [*CAPTIONS, "a star", "red", "a"]
    images, texts = scorer.images(photos), scorer.texts(captions)
    monkeypatch.setattr(networks, "TOGETHER", 2)
    np.testing.assert_allclose(scorer.images(photos), images, atol=1e-6)
    np.testing.assert_allclose(scorer.texts(captions), texts, atol=1e-6)
    np.testing.assert_allclose(scorer.texts(captions[2:3]), texts[2:3], atol=1e-6)


def test_a_caption_that_just_fits_is_not_counted(clip_folder):
    scorer, _ = clip(clip_folder, "cpu")
    scorer.texts(["red " * 14])  # and the start and the end
    assert scorer.truncated == 0
    scorer.texts(["red " * 15])
    assert scorer.truncated == 1


@pytest.mark.parametrize(("name", "published"), [(networks.CLIP, True), ("someone/clip", None)])
def test_the_default_clip_of_the_hub_is_published(clip_folder, monkeypatch, name, published):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(clip_folder))
    weights = clip(name, "cpu")[1]
    assert (weights.origin, weights.published) == (name, published)


def test_only_the_default_clip_may_be_unavailable():
    with pytest.raises(Unavailable, match=f"--clip_model {networks.CLIP} cannot be had from the Hub, name a folder"):
        clip(networks.CLIP, "cpu")
    with pytest.raises(EvaluationError, match="--clip_model someone/none cannot be had") as problem:
        clip("someone/none", "cpu")
    assert not isinstance(problem.value, Unavailable)


@pytest.fixture
def pickled_clip(clip_folder, tmp_path):
    """The same model as it was kept before safetensors: a function that writes what it is given as its weights."""
    for path in clip_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)

    def write(state):
        torch.save(state, tmp_path / "pytorch_model.bin")
        return tmp_path

    return write


def test_the_published_pickle_is_the_same_clip(clip_folder, pickled_clip, any_is_published):
    folder = pickled_clip(CLIPModel.from_pretrained(clip_folder).state_dict())
    scorer, weights = clip(folder, "cpu")
    assert weights.sha256 == digest(folder / "pytorch_model.bin")
    assert np.array_equal(scorer.texts(CAPTIONS), clip(clip_folder, "cpu")[0].texts(CAPTIONS))


def test_a_pickle_of_more_than_tensors_is_no_clip(pickled_clip, any_is_published):
    with pytest.raises(EvaluationError, match=r"--clip_model .* cannot be opened"):
        clip(pickled_clip({"a": Anything()}), "cpu")


def test_a_clip_that_lacks_weights_is_refused(clip_folder, pickled_clip, any_is_published):
    state = CLIPModel.from_pretrained(clip_folder).state_dict()
    del state["visual_projection.weight"]
    with pytest.raises(EvaluationError, match=r"lacks 1 weights of a CLIPModel \(visual_projection.weight"):
        clip(pickled_clip(state), "cpu")


def test_a_text_encoder_alone_is_no_clip(tmp_path):
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(**layers)).save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="--clip_model"):
        clip(tmp_path, "cpu")
