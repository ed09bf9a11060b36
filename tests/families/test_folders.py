"""Copies of the parts of pipelines: nothing that can run code, and the plain name where there is only a variant."""

import json

import pytest

from finetuning.families.folders import copy_part, parts_of_index, weights_name, write_scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def part(tmp_path):
    """part(*names) is a folder with files that hold their own names."""

    def make(*names):
        folder = tmp_path / "part"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name)
        return folder

    return make


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_part_is_copied_without_the_pickles_beside_its_weights(part, tmp_path):
    copy_part(part("config.json", WEIGHTS, "diffusion_pytorch_model.bin"), tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"config.json": "config.json", WEIGHTS: WEIGHTS}


def test_a_pickle_that_is_all_there_is_is_copied_but_not_without_weights(part, tmp_path):
    source = part("config.json", "pytorch_model.bin")
    copy_part(source, tmp_path / "copy")
    copy_part(source, tmp_path / "bare", weights=False)
    assert contents(tmp_path / "copy").keys() == {"config.json", "pytorch_model.bin"}
    assert contents(tmp_path / "bare").keys() == {"config.json"}


def test_a_variant_alone_takes_the_plain_name(part, tmp_path):
    copy_part(part("model.fp16.safetensors"), tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"model.safetensors": "model.fp16.safetensors"}


def test_without_weights_no_list_of_their_pieces_is_left(part, tmp_path):
    names = (f"{WEIGHTS}.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors", "config.json")
    copy_part(part(*names), tmp_path / "copy", weights=False)
    assert contents(tmp_path / "copy").keys() == {"config.json"}


def test_the_scheduler_says_what_the_unet_predicts(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/scheduler_config.json").write_text('{"beta_start":   0.1}')
    write_scheduler(tmp_path / "old", tmp_path / "same", "epsilon")
    write_scheduler(tmp_path / "old", tmp_path / "other", "v_prediction")
    assert (tmp_path / "same/scheduler_config.json").read_text() == '{"beta_start":   0.1}'
    changed = json.loads((tmp_path / "other/scheduler_config.json").read_text())
    assert changed == {"beta_start": 0.1, "prediction_type": "v_prediction"}


def test_names():
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": [None, None], "requires": True}
    assert parts_of_index(index) == ["unet"]
    assert weights_name("unet") == WEIGHTS and weights_name("text_encoder", "fp16") == "model.fp16.safetensors"
