"""FID and KID from image files to figure are those of torch-fidelity and of pytorch-fid, same weights."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch_fidelity
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as pytorch_fid_inception
from safetensors.torch import load_file

from finetuning.evaluation.generation import Row
from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks, summarise

pytestmark = pytest.mark.run

COUNT, SIDE = 5, 64
SAME = pytest.approx


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
def figures(folders, metric_weights):
    """{"fid": ..., "kid": ...} of the drawn folder against the truth, by this project from files to summary."""
    weights = str(metric_weights / "inception.safetensors")
    args = EvalNetworkArgs(metrics=["kid", "fid"], inception_weights=weights)
    opened = open_networks(args)

    @cache
    def of(protocol, drawn="drawn"):
        rows = [Row(number, f"image {number}", folders["truth"] / f"{number:05d}.png") for number in range(COUNT)]
        images = {"model": {row.number: folders[drawn] / row.image.name for row in rows}}
        summary = summarise(measure(rows, images, opened, replace(args, protocol=protocol)))["summary"]
        return {metric: by_side[str(SIDE)]["model"]["value"] for metric, by_side in summary.items()}

    return of


def test_fid_and_kid_are_torch_fidelitys(figures, folders, metric_weights):
    wanted = torch_fidelity.calculate_metrics(
        input1=str(folders["drawn"]), input2=str(folders["truth"]), fid=True, kid=True, kid_subsets=1, cache=False,
        kid_subset_size=COUNT, batch_size=COUNT, cuda=False, verbose=False, samples_find_deep=False,
        feature_extractor_weights_path=str(metric_weights / "inception.pth"),
    )  # fmt: skip
    found = figures("tf")
    assert found["fid"] == SAME(wanted["frechet_inception_distance"], rel=1e-5)
    assert found["kid"] == SAME(wanted["kernel_inception_distance_mean"], rel=1e-5)


def test_legacy_fid_is_pytorch_fids(figures, folders, metric_weights, monkeypatch):
    load = lambda *_, **__: load_file(metric_weights / "inception.safetensors")
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
