"""FID and KID from image files to figure are those of torch-fidelity's command and of pytorch-fid, same weights."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as pytorch_fid_inception
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception

from finetuning.evaluation.generation import Row
from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks, summarise

pytestmark = pytest.mark.run

COUNT, SIDE = 8, 64
SAME = pytest.approx


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights under torch-fidelity's keys that neither let the features vanish nor explode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch_fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = torch_fidelity_inception.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for weights in network.parameters():
        if weights.dim() > 1:
            torch.nn.init.kaiming_normal_(weights, nonlinearity="relu")
    # torch-fidelity's kernels are float32: large features keep a KID of some size out of their rounding
    network.Conv2d_1a_3x3.conv.weight.data *= 4
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)  # for the peer
    save_file(network.state_dict(), path.with_suffix(".safetensors"))
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of images of unlike kinds: coarse patches in warm colours, fine ones in cold colours."""
    generator, made = np.random.default_rng(0), {}
    for name, patches, tint in (("truth", 4, (255, 180, 90)), ("drawn", 16, (60, 120, 220))):
        made[name] = tmp_path_factory.mktemp(name)
        for number in range(COUNT):
            pixels = (generator.random((patches, patches, 3)) * tint).astype(np.uint8)
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(made[name] / f"{number:05d}.png")
    return made


@pytest.fixture(scope="session")
def figures(folders, inception_file):
    """{"fid": ..., "kid": ...} of the drawn folder against the truth, by this project from files to summary."""

    @cache
    def of(protocol, drawn="drawn"):
        rows = [Row(number, f"image {number}", folders["truth"] / f"{number:05d}.png") for number in range(COUNT)]
        images = {"model": {row.number: folders[drawn] / row.image.name for row in rows}}
        args = EvalNetworkArgs(
            metrics=["kid", "fid"], protocol=protocol, inception_weights=str(inception_file.with_suffix(".safetensors"))
        )
        summary = summarise(measure(rows, images, open_networks(args), args))["summary"]
        return {metric: by_side[str(SIDE)]["model"]["value"] for metric, by_side in summary.items()}

    return of


@pytest.fixture(scope="session")
def torch_fidelity_says(folders, inception_file):
    """What torch-fidelity's own command prints for the same folders and weights, KID over all images at once."""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent"]
    command += ["--input1", folders["drawn"], "--input2", folders["truth"], "--fid", "--kid", "--no-cache"]
    command += ["--kid-subsets", "1", "--kid-subset-size", str(COUNT), "--batch-size", str(COUNT)]
    command += ["--feature-extractor-weights-path", inception_file]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fid_and_kid_are_those_of_torch_fidelitys_command(figures, torch_fidelity_says):
    found = figures("tf")
    assert found["fid"] == SAME(torch_fidelity_says["frechet_inception_distance"], rel=1e-5)
    assert found["kid"] == SAME(torch_fidelity_says["kernel_inception_distance_mean"], rel=1e-5)


def test_legacy_fid_is_pytorch_fids(figures, folders, inception_file, monkeypatch):
    load = lambda *_, **__: torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(pytorch_fid_inception, "load_state_dict_from_url", load)
    network = pytorch_fid_inception.InceptionV3()
    sets = [
        fid_score.get_activations(sorted(folders[name].glob("*.png")), network, COUNT, num_workers=0)
        for name in ("drawn", "truth")
    ]
    # In a basis of the images' own span the distance is the same, and pytorch-fid's root takes no 23 s
    basis = np.linalg.qr(np.concatenate(sets).astype(np.float64).T)[0]  # [2048, 2 x images]
    moments = [moment for one in sets for moment in ((one @ basis).mean(0), np.cov(one @ basis, rowvar=False))]
    assert figures("legacy")["fid"] == SAME(fid_score.calculate_frechet_distance(*moments), rel=1e-5)
