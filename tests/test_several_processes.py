"""train_*.py on two processes, each way of dividing the work between them, beside one process."""

import json
import shlex
import shutil

import pytest
import torch

FULL, LORA = "train_text_to_image", "train_lora"


def test_two_processes_train_and_evaluate_as_one(script, training, arguments, tiny_sdxl, tmp_path, tensors):
    plain = shlex.split("""--learning_rate 1e-4 --max_train_steps 4 --center_crop --cache_latents
        --validation_prompts 'a red circle' 'a blue square' --validation_inference_steps 1""")
    plain += ["--pretrained_model_name_or_path", tiny_sdxl]  # some of its weights get no gradient
    words = {name: [*arguments, *plain, "--cache_folder", tmp_path / f"cache of {name}"] for name in ("one", "two")}
    assert training.run(script, words["one"], tmp_path / "one") == 0
    # fp16 as in the shipped accelerate_config.yaml: asking whether there is a GPU must not make the processes one
    run = (script, words["two"], tmp_path / "two", "--gradient_accumulation_steps", 1)
    assert training.on_two_processes(*run, ACCELERATE_MIXED_PRECISION="fp16") == [0, 0]
    facts = json.loads((tmp_path / "two/args.json").read_text())
    assert facts["run"]["processes"] == 2  # `accelerate launch --cpu --num_processes 2` was seen to start one
    assert_close(training, tensors, tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two/comparison.png").is_file()


def assert_close(training, tensors, folder, other, atol=1e-6):
    """Two runs of four steps computed the same but for rounding."""
    one, two = tensors(folder / "checkpoint-4"), tensors(other / "checkpoint-4")
    assert one.keys() == two.keys()
    for part, weights in one.items():
        for name, value in weights.items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=atol, msg=f"{part} {name}")
    evaluated = [[line for line in training.metrics(run) if "validation_loss" in line] for run in (folder, other)]
    for single, shared in zip(*evaluated, strict=True):
        assert shared == {name: pytest.approx(value, abs=1e-5) for name, value in single.items()}


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("model", "launcher", "resumes"),  # a run under FSDP takes 15 s
    [("tiny_model", FSDP, True), ("tiny_sdxl", FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, False),
     ("tiny_sdxl", ZERO, True)],
    ids=("fsdp", "fsdp-sdxl", "zero-sdxl"),
)  # fmt: skip
def test_two_processes_that_divide_what_they_train_do_as_one(
    model, launcher, resumes, training, arguments, tmp_path, tensors, request
):
    words = [*arguments, "--learning_rate", "1e-4", "--max_train_steps", 4]
    words += ["--pretrained_model_name_or_path", request.getfixturevalue(model)]
    if model == "tiny_model":
        words += shlex.split("--validation_prompts 'a red circle' --validation_inference_steps 1 --validation_steps 2")
    assert training.run(FULL, words, tmp_path / "one") == 0
    split = [*words, "--train_batch_size", 1]
    assert training.on_two_processes(FULL, split, tmp_path / "two", **launcher) == [0, 0]
    assert_close(training, tensors, tmp_path / "two", tmp_path / "one", atol=2e-5)
    for config in (tmp_path / "one").rglob("config.json"):  # by which readers know its classes
        assert json.loads((tmp_path / "two" / config.relative_to(tmp_path / "one")).read_text()) == json.loads(
            config.read_text()
        )
    if not resumes:
        return
    # Its checkpoint is one like any other
    for name in ("divided again", "by one process"):
        shutil.copytree(tmp_path / "two", tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-4"))
    on = ("--resume_from_checkpoint", "latest")
    assert training.run(FULL, words, tmp_path / "by one process", *on) == 0
    assert_close(training, tensors, tmp_path / "by one process", tmp_path / "two", atol=2e-5)
    assert training.on_two_processes(FULL, split, tmp_path / "divided again", *on, **launcher) == [0, 0]
    training.assert_same(tmp_path / "divided again", tmp_path / "two")


@pytest.mark.parametrize(
    ("launcher", "which", "flags", "named"),
    [(FSDP, FULL, ("--use_8bit_adam", "--offload_ema"), "FSDP goes with --optimizer adamw, no --offload_ema here"),
     (ZERO, FULL, ("--channels_last", "--compile"), "DeepSpeed goes with no --compile, no --channels_last here"),
     (FSDP, LORA, (), "adapters are small: launch with accelerate_config.yaml")],
)  # fmt: skip
def test_what_does_not_go_with_divided_weights_is_named(
    launcher, which, flags, named, training, arguments, tmp_path, capfd
):
    assert training.on_two_processes(which, arguments, tmp_path / "run", *flags, **launcher) == [1, 1]
    assert named in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
