"""Averages made after the run, as files: what the plan says is what the weights are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_checkpoints
from finetuning.files import write_json
from finetuning.merging.post_hoc import PostHocArgs, plan

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The folder of a run: three checkpoints with raw and averaged UNets that all differ. Never write to it."""
    folder = tmp_path_factory.mktemp("run")
    base = load_file(tiny_model / "unet" / FILE)
    generator = torch.Generator().manual_seed(0)
    for step in (100, 200, 300):
        for part in ("unet", "unet_ema"):
            place = folder / f"checkpoint-{step}" / part
            place.mkdir(parents=True)
            shutil.copyfile(tiny_model / "unet/config.json", place / "config.json")
            moved = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
            save_file(moved, place / FILE, metadata={"format": "pt"})
        args = {"pretrained_model_name_or_path": str(tiny_model), "prediction_type": None, "use_ema": True}
        args |= {"ema_decay": 0.99, "ema_start": "ramp"}
        state = {"step": step, "ema_updates": step, "dataset": "d", "args": args}
        write_json(folder / f"checkpoint-{step}/training_state.json", state)
    return folder


def average(run, out, *words):
    assert merge_checkpoints.main(["ema", str(run), *map(str, words), "--output_dir", str(out)]) == 0


def expected(run, **flags):
    """The UNet of each width in float64, by the plan's own numbers."""
    found = []
    for one in plan(PostHocArgs(run_dir=str(run), **flags)):
        total = 0
        for folder, kind, weight in one.weights:
            tensors = load_file(folder / {"raw": "unet", "ema": "unet_ema"}[kind] / FILE)
            flat = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
            total = total + weight * flat
        found.append(total)
    return found


def flat(path):
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_each_width_is_a_pipeline_of_the_sum_that_was_planned(run, tiny_model, tmp_path):
    average(run, tmp_path / "out", "--sigma_rel", 0.05, 0.2)
    first, second = expected(run, sigma_rel=[0.05, 0.2])
    for width, wanted in ((0.05, first), (0.2, second)):
        folder = tmp_path / f"out/sigma_rel-{width:g}"
        torch.testing.assert_close(flat(folder / "unet" / FILE), wanted, rtol=1e-6, atol=1e-7)
        for part in ("text_encoder/model.safetensors", f"vae/{FILE}", "model_index.json"):
            assert (folder / part).read_bytes() == (tiny_model / part).read_bytes(), part
    assert not torch.allclose(first, second)


def test_one_width_goes_into_the_folder_itself_and_one_kind_of_weights_can_be_chosen(run, tmp_path):
    average(run, tmp_path / "out", "--sigma_rel", 0.1, "--weights", "raw", "--at", 200)
    (wanted,) = expected(run, sigma_rel=[0.1], weights="raw", at=200)
    torch.testing.assert_close(flat(tmp_path / "out/unet" / FILE), wanted, rtol=1e-6, atol=1e-7)
    recipe = json.loads((tmp_path / "out/merge.json").read_text())
    assert {one["given"] for one in recipe["run"]["inputs"]} <= {str(run / f"checkpoint-{n}") for n in (100, 200)}


def test_the_recipe_makes_the_same_bytes_again(run, tmp_path):
    average(run, tmp_path / "out", "--sigma_rel", 0.1)
    words = ["replay", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
    assert merge_checkpoints.main(words) == 0
    assert (tmp_path / "again/unet" / FILE).read_bytes() == (tmp_path / "out/unet" / FILE).read_bytes()


def test_a_run_whose_base_is_gone_is_refused_by_name(run, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    for path in moved.rglob("training_state.json"):
        state = json.loads(path.read_text())
        state["args"]["pretrained_model_name_or_path"] = str(tmp_path / "gone")
        write_json(path, state)
    words = ["ema", str(moved), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "out")]
    assert merge_checkpoints.main(words) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "gone") in said and not (tmp_path / "out").exists()
