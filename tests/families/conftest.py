"""Models that a test may change, and a Hub cache."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def hub_cache(tiny_model, tmp_path):
    """A Hub cache that holds org/name: main, and a revision v2 whose UNet has each weight one higher."""
    storage = tmp_path / "hub/models--org--name"
    (storage / "refs").mkdir(parents=True)
    for number, revision in enumerate(("main", "v2")):
        (storage / "refs" / revision).write_text(str(number) * 40)
        snapshot = storage / "snapshots" / (str(number) * 40)
        shutil.copytree(tiny_model, snapshot)
        path = snapshot / "unet/diffusion_pytorch_model.safetensors"
        weights = {key: value + number for key, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return storage.parent
