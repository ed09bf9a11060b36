"""Every train_*.py, run as a user runs it, held to the same invariants."""

import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetuning import files
from finetuning.families.pipelines import open_pipeline
from finetuning.training.checkpoint import checkpoints_in

FULL, LORA = "train_text_to_image", "train_lora"
STEPS = 6
BUCKETS = ("--aspect_buckets", "--bucket_step", 8)


def losses(training, folder):
    return [line["train_loss"] for line in training.steps(folder)]


# -- exact resume ------------------------------------------------------------------------------------------------------


# The first step, the end of an epoch, the middle of one
@pytest.mark.parametrize(("script", "stopped_at"), [(FULL, 1), (FULL, 3), (FULL, 5), (LORA, 1), (LORA, 5)])
def test_a_resumed_run_equals_an_uninterrupted_one(script, training, arguments, whole_run, tmp_path, stopped_at):
    training.assert_resumes_exactly(script, arguments, whole_run(script), stopped_at, tmp_path)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (FULL, "--use_8bit_adam"),
        (LORA, "--center_crop --cache_latents"),
        (FULL, "buckets"),
        (LORA, "buckets --center_crop --cache_latents"),
        (FULL, "--fused_backward_pass --optimizer adafactor --max_grad_norm 0 --gradient_accumulation_steps 1"),
        (LORA, "--fused_backward_pass --max_grad_norm 0 --gradient_accumulation_steps 1"),
    ],
)
def test_other_ways_resume_exactly(script, training, arguments, bucketed, tmp_path, flags):
    words = [*arguments, "--max_train_steps", 5, *flags.replace("buckets", shlex.join(map(str, bucketed))).split()]
    assert training.run(script, words, tmp_path / "straight") == 0
    training.assert_resumes_exactly(script, words, tmp_path / "straight", 2, tmp_path / "resumed")


@pytest.mark.parametrize("script", [FULL])  # the LoRA's checkpoints are written by the same code
def test_killed_at_random_moments_and_inside_saves_nothing_is_lost(
    script, training, arguments, whole_run, tmp_path, monkeypatch
):
    folder = tmp_path / "killed"
    sync = files._sync
    monkeypatch.setattr(files, "_sync", lambda path: (time.sleep(0.005), sync(path)))  # a slow disk: long saves
    rng = random.Random(0)
    more = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest")
    work = lambda: training.run(script, arguments, folder, *more)
    newest = lambda: max((step for step, _ in checkpoints_in(folder)), default=0)
    saving = lambda: any(folder.glob(f"{files.INCOMPLETE}checkpoint-*"))

    killed_in_save = 0
    for new_checkpoints, in_save in [(0, True), (1, False), (1, True)]:
        done, child = newest(), training.in_child(work)
        while newest() < done + new_checkpoints or (in_save and not saving()):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        killed_in_save += saving()
    assert killed_in_save >= 1
    assert os.waitstatus_to_exitcode(os.waitpid(training.in_child(work), 0)[1]) == 0
    assert not saving()
    training.assert_same(folder, whole_run(script))


@pytest.mark.parametrize("script", [LORA])
def test_a_seed_that_was_drawn_is_kept_on_resume_and_the_steps_are_exact(script, training, arguments, tmp_path):
    cut = arguments.index("--seed")
    words = [*arguments[:cut], *arguments[cut + 2 :], "--lr_scheduler", "constant"]
    steps = lambda count: ("--max_train_steps", count)
    assert training.run(script, words, tmp_path / "straight", *steps(4)) == 0
    assert training.run(script, words, tmp_path / "resumed", *steps(2), "--seed", _seed(tmp_path / "straight")) == 0
    assert training.run(script, words, tmp_path / "resumed", *steps(4), "--resume_from_checkpoint", "latest") == 0
    assert [line["step"] for line in training.steps(tmp_path / "resumed")] == [1, 2, 3, 4]
    for name in ("straight", "resumed"):
        (tmp_path / name / "metrics.jsonl").unlink()  # the shorter run was evaluated at its own end too
    training.assert_same(tmp_path / "resumed", tmp_path / "straight")


def _seed(folder):
    return json.loads((folder / "args.json").read_text())["seed"]


def test_args_json_repeats_the_run_as_a_config(script, training, whole_run, tmp_path):
    assert training.run(script, ["--config", whole_run(script) / "args.json"], tmp_path) == 0
    training.assert_same(tmp_path, whole_run(script))


# -- one global batch, cut in any way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [FULL])
def test_accumulation_and_batch_size_are_interchangeable(script, training, arguments, whole_run, tmp_path):
    for batch, accumulation in ((4, 1), (1, 4)):
        size = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        assert training.run(script, arguments, tmp_path / str(batch), *size) == 0
        assert losses(training, tmp_path / str(batch)) == pytest.approx(losses(training, whole_run(script)), rel=1e-5)


@pytest.fixture(scope="session")
def bucketed(shapes_folder, tmp_path_factory):
    """11 rows in three buckets, groups of 4: 7 rows as 4 + 3, two of 2 rows; the held out rows in two."""
    folder = tmp_path_factory.mktemp("buckets") / "shapes"
    shutil.copytree(shapes_folder, folder)
    sizes = {"00001": (64, 40), "00004": (64, 40), "00006": (40, 64), "00010": (40, 64)}  # width, height
    for path in folder.rglob("*.png"):
        if path.stem in sizes:
            Image.open(path).resize(sizes[path.stem]).save(path)
    return ["--train_data_dir", folder, *BUCKETS]


def test_with_square_images_buckets_change_nothing(training, arguments, whole_run, tmp_path):
    assert training.run(FULL, arguments, tmp_path, *BUCKETS) == 0
    training.assert_same(tmp_path, whole_run(FULL))


@pytest.mark.parametrize(("script", "cut"), [(FULL, "buckets --center_crop"), (LORA, "--cached_crops 2")])
def test_with_the_cache_a_run_trains_the_same_to_the_last_bit(script, training, arguments, bucketed, tmp_path, cut):
    words = [word for word in arguments if word != "--train_text_encoder"]
    words += ["--max_train_steps", 5, "--flip_captions", "swap", "--validation_prompt", "a red circle"]
    words += ["--validation_inference_steps", 1, *cut.replace("buckets", shlex.join(map(str, bucketed))).split()]
    folder = ("--cache_folder", tmp_path / "cache")
    for name, more in {"without": "--no-cache_latents", "first": "--cache_latents", "again": "--cache_latents"}.items():
        assert training.run(script, words, tmp_path / name, *folder, more) == 0
    for name in ("first", "again"):
        training.assert_same(tmp_path / name, tmp_path / "without")
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) >= 2  # latents and text


def test_buckets_are_counted_and_other_ones_named_on_resume(training, arguments, bucketed, tmp_path, capfd):
    assert training.run(FULL, arguments, tmp_path, *bucketed, "--max_train_steps", 2) == 0
    said = capfd.readouterr().err
    assert "32x32: 7; 24x40: 2; 40x24: 2" in said
    assert "3 of the 4 steps of an epoch have fewer than 4 rows" in said
    other = ("--max_side", 32, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    assert training.run(FULL, arguments, tmp_path, *bucketed, *other) == 0
    changes = capfd.readouterr().err.split("these have changed")[1].splitlines()[0]
    assert "--max_side None -> 32" in changes and "dataset" in changes


def test_epochs_decide_where_no_steps_are_given(training, arguments, tmp_path):
    cut = arguments.index("--max_train_steps")
    words = [*arguments[:cut], *arguments[cut + 2 :], "--num_train_epochs", 2, "--checkpointing_epochs", 1]
    assert training.run(FULL, words, tmp_path, "--checkpointing_steps", 0) == 0
    assert len(training.steps(tmp_path)) == 6  # three steps an epoch
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3, 6]


# -- what is handed over -----------------------------------------------------------------------------------------------


def test_the_pipeline_loads_holds_both_weights_and_leaves_the_rest_untouched(training, arguments, tiny_model, tmp_path):
    words = [word for word in arguments if word != "--train_text_encoder"]
    assert training.run(FULL, words, tmp_path, "--prediction_type", "v_prediction", "--max_train_steps", 2) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert pipeline("a red circle", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in (tiny_model / part).iterdir():
            assert (tmp_path / part / path.name).read_bytes() == path.read_bytes()
            assert (tmp_path / part / path.name).stat().st_mode & 0o777 == 0o666 & ~files._umask()
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    for name, kept in (("", "unet_ema"), (".non_ema", "unet")):
        finished = tmp_path / f"unet/diffusion_pytorch_model{name}.safetensors"
        assert files.sha256(finished) == files.sha256(
            tmp_path / f"checkpoint-2/{kept}/diffusion_pytorch_model.safetensors"
        )


def test_weights_in_bf16_resume_exactly_beside_an_average_in_fp32(training, arguments, tmp_path, tensors):
    words = [*arguments, "--mixed_precision", "bf16", "--weights_precision", "bf16", "--max_train_steps", 4]
    assert training.run(FULL, words, tmp_path / "straight") == 0
    resumed = tmp_path / "resumed"
    training.assert_resumes_exactly(FULL, words, tmp_path / "straight", 2, resumed)
    dtypes = {path: {value.dtype for value in one.values()} for path, one in tensors(resumed).items()}
    assert dtypes["unet/diffusion_pytorch_model.non_ema.safetensors"] == {torch.bfloat16}
    assert dtypes["checkpoint-4/unet/diffusion_pytorch_model.safetensors"] == {torch.bfloat16}
    assert dtypes["unet/diffusion_pytorch_model.safetensors"] == {torch.float32}
    pipeline = StableDiffusionPipeline.from_pretrained(resumed, variant="non_ema")
    assert pipeline.unet.dtype == torch.float32  # from_pretrained's default, whatever the file has


def test_weights_loaded_apart_keep_their_share_in_the_average(training, arguments, tiny_model, tmp_path, tensors):
    """With a learning rate of 0 the trained weights stay the raw ones, so the average is known exactly."""
    apart = ("--non_ema_variant", "non_ema", "--learning_rate", 0)
    assert training.run(FULL, arguments, tmp_path, *apart) == 0
    base, remains = tensors(tiny_model), 0.9**STEPS
    main, raw = (base[f"unet/diffusion_pytorch_model{name}.safetensors"] for name in ("", ".non_ema"))
    for name, value in tensors(tmp_path)["unet/diffusion_pytorch_model.safetensors"].items():
        expected = remains * main[name] + (1 - remains) * raw[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", [LORA])
def test_evaluation_shows_the_base_first_and_changes_nothing_of_what_is_trained(
    script, training, arguments, whole_run, tmp_path
):
    looks = ["--validation_prompts", "a red circle", "a blue square", "--validation_steps", "3"]
    looks += ["--validation_inference_steps", "2", "--report_to", "tensorboard"]
    assert training.run(script, arguments, tmp_path, *looks) == 0
    assert training.state(tmp_path)[:2] == training.state(whole_run(script))[:2]
    assert training.steps(tmp_path) == training.steps(whole_run(script))
    written = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert written == ["base_evaluation.json", "step-0", "step-3", "step-6"]
    assert (tmp_path / "comparison.png").is_file()
    found = {line["step"]: line for line in training.metrics(tmp_path) if "validation_loss" in line}
    assert sorted(found) == [0, 3, 6]
    change = found[6]["validation_loss"] - found[0]["validation_loss"]
    assert found[6]["validation_loss_change"] == pytest.approx(change, abs=1e-6)
    [log] = {path.parent for path in (tmp_path / "logs").rglob("events*") if path.parent.name == "text2image-fine-tune"}
    events = EventAccumulator(str(log)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, STEPS + 1))
    assert {"lr", "grad_norm", "validation_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("validation/1")] == [0, 3, 6]


# -- what each flag is for ---------------------------------------------------------------------------------------------


class Way:
    """A run of one or two steps with some flags, beside the plain one of as many."""

    def __init__(self, training, folder, plain, said, tensors):
        self.folder, self.plain, self.said = Path(folder), Path(plain), said
        self.training, self.tensors = training, tensors
        (self.line, *_), (self.before, *_) = training.steps(folder), training.steps(plain)

    def equals(self):
        """Not a bit is different."""
        self.training.assert_same(self.folder, self.plain)

    def loss_changes(self, factor=None):
        """The loss of the first step, whose weights are the base's, is another one; it changes nothing but that."""
        loss, before = self.line["train_loss"], self.before["train_loss"]
        assert loss != before and (factor is None or loss == pytest.approx(factor * before))
        return loss / before

    def optimizer(self):
        return torch.load(self.folder / "checkpoint-2/optimizer.pt", weights_only=True)["optimizer"]

    def config(self, name):
        return json.loads((self.folder / name).read_text())

    def weights(self, name="unet/diffusion_pytorch_model.non_ema.safetensors"):
        return self.tensors(self.folder)[name]

    def lora(self):
        return self.weights("pytorch_lora_weights.non_ema.safetensors")

    def close(self):
        """Up to rounding the same steps."""
        for one, other in zip(self.training.steps(self.folder), self.training.steps(self.plain), strict=True):
            assert one == {name: pytest.approx(value, rel=1e-4) for name, value in other.items()}

    def is_rank(self, pattern, rank):
        shapes = {value.shape[0] for key, value in self.lora().items() if pattern in key and "lora_A" in key}
        assert shapes == {rank}, pattern


def bf16(way):
    assert 0 < abs(way.loss_changes() - 1) < 0.05
    kept = way.tensors(way.folder / "checkpoint-2")
    assert {value.dtype for one in kept.values() for value in one.values()} == {torch.float32}


def from_scratch(way):
    assert way.config("unet/config.json")["layers_per_block"] == 2
    assert way.loss_changes() and "down_blocks.0.resnets.1.conv1.weight" in way.weights()


def other_target(way):
    way.loss_changes()
    assert way.config("scheduler/scheduler_config.json")["prediction_type"] == "sample"


def zero_snr(way):
    assert way.loss_changes() and all(math.isfinite(line["train_loss"]) for line in way.training.steps(way.folder))
    sampler = open_pipeline(way.folder / "checkpoint-2").scheduler.config
    assert way.config("scheduler/scheduler_config.json").items() <= dict(sampler).items()
    assert (sampler.rescale_betas_zero_snr, sampler.timestep_spacing) == (True, "trailing")


def other_size(way):
    way.loss_changes()
    assert Image.open(way.folder / "validation/step-0/prompt00-0.png").size == (40, 32)


def rate_of_text(way):
    unet, text = (group["lr"] for group in way.optimizer()["param_groups"])
    assert text == pytest.approx(unet / 100)


def held_out_by_share(way):
    trained, held_out = map(int, re.search(r"dataset: (\d+) rows, (\d+) held out", way.said).groups())
    assert (trained, held_out) == (6, 2)


WAYS = {  # flags: what they are for
    "--loss_type huber": lambda way: way.loss_changes() < 1 or pytest.fail("Huber's loss is never above the square"),
    "--dream_training": Way.loss_changes,
    "--prediction_type sample": other_target,
    "--rescale_betas_zero_snr --prediction_type v_prediction": zero_snr,
    "--random_resized_crop_scale 0.5": Way.loss_changes,
    "--center_crop --image_interpolation_mode bicubic": Way.loss_changes,
    "--resolution 32x40 --validation_prompt circle --validation_inference_steps 1": other_size,
    "--caption_column none": Way.loss_changes,
    "--train_data_dir SHAPES/train --validation_fraction 0.2 --max_train_samples 6": held_out_by_share,
    "--gradient_checkpointing": Way.close,
    "--offload_ema --foreach_ema": Way.equals,
    "--dataloader_num_workers 2": Way.equals,
    "--enable_xformers_memory_efficient_attention": lambda way: (way.equals(), "xformers" in way.said or pytest.fail()),
    "--mixed_precision fp16": Way.equals,  # without a GPU it is fp32
    "--mixed_precision bf16": bf16,
    "--text_encoder_lr 1e-5": rate_of_text,
    "--scale_lr --report_to all": lambda way: pytest.approx(4 * way.before["lr"]) == way.line["lr"] or pytest.fail(),
    "--optimizer adafactor": lambda way: "row_var" in way.optimizer()["state"][0] or pytest.fail(),
    "--optimizer prodigy --learning_rate 1": lambda way: way.optimizer()["param_groups"][0]["d"] > 0 or pytest.fail(),
    "--from_scratch --unet_config '{layers_per_block: 2}'": from_scratch,
}  # fmt: skip


def all_layers(way):
    names = set(way.lora())
    assert any("conv1.lora_A" in name for name in names) and any("ff.net.2" in name for name in names)
    assert "lora_unet_mid_block_resnets_0_conv1.lora_down.weight" in way.weights("kohya_lora_weights.safetensors")


def ranks(way):
    way.is_rank("attn2.to_k", 8)
    way.is_rank("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 3)
    way.is_rank("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v", 4)


def dropped(way):
    """What is behind an adapter starts at nothing, so that dropout shows from the second step on."""
    now, before = (way.training.steps(folder) for folder in (way.folder, way.plain))
    assert now[0]["train_loss"] == before[0]["train_loss"] and now[1]["train_loss"] != before[1]["train_loss"]


def quantized(way):
    assert 0 < abs(way.loss_changes() - 1) < 0.2 and ("nf4" in way.said or "int8" in way.said)


LORA_WAYS = {
    "--use_dora": lambda way: any("magnitude" in name for name in way.lora()) or pytest.fail(),
    "--use_rslora --lora_alpha 3 --text_encoder_rank 2": lambda way: (
        way.is_rank("text_encoder.", 2), way.is_rank("unet.", 4)
    ),
    "--lora_target_modules all-linear conv --save_kohya": all_layers,
    "--lora_rank_pattern attn2.to_k=8 'mid_block.*attn1.*=3' --lora_alpha_pattern to_v=1": ranks,
    "--lora_dropout 0.3": dropped,
    "--base_precision nf4": quantized,
    "--base_precision int8": quantized,
    "--base_precision nf4 --use_dora": quantized,
    "--mixed_precision bf16 --base_precision bf16": bf16,
    "--mixed_precision bf16 --base_precision fp32": bf16,
}  # fmt: skip


@pytest.fixture(scope="session")
def way(training, arguments, shapes_folder, tmp_path_factory, tensors):
    """A Way of a script with some flags; the plain run beside it is made once."""
    plain = {}

    def run(script, flags, capfd):
        words = [*arguments, "--max_train_steps", 2, "--lr_scheduler", "constant"]
        if script not in plain:
            plain[script] = tmp_path_factory.mktemp("plain")
            assert training.run(script, words, plain[script]) == 0
        folder = tmp_path_factory.mktemp("way")
        capfd.readouterr()
        assert training.run(script, words, folder, *shlex.split(flags.replace("SHAPES", str(shapes_folder)))) == 0
        return Way(training, folder, plain[script], capfd.readouterr().err, tensors)

    return run


@pytest.mark.parametrize("flags", WAYS)
def test_what_a_flag_is_for(way, flags, capfd):
    """With the full fine-tune: both scripts have the same Session."""
    WAYS[flags](way(FULL, flags, capfd))


@pytest.mark.parametrize("flags", LORA_WAYS)
def test_what_a_flag_of_adapters_is_for(way, flags, capfd):
    LORA_WAYS[flags](way(LORA, flags, capfd))


def test_gradients_are_clipped_and_their_norm_before_is_logged(training, arguments, tmp_path):
    """Plain Adam hides the gradient's size, so the clip is seen in Adam's first moment."""
    assert training.run(FULL, arguments, tmp_path, "--max_train_steps", 1, "--max_grad_norm", 1e-4) == 0
    assert training.steps(tmp_path)[0]["grad_norm"] > 1e-2
    moments = torch.load(tmp_path / "checkpoint-1/optimizer.pt", weights_only=True)["optimizer"]["state"]
    norm = torch.stack([one["exp_avg"].norm() / (1 - 0.9) for one in moments.values()]).norm().item()
    assert norm == pytest.approx(1e-4, rel=1e-2)


def test_the_loss_of_prior_rows_is_weighed(training, arguments, shapes_folder, tmp_path):
    found = []
    for weight in (0, 1, 2):
        prior = ("--prior_data_dir", shapes_folder / "validation", "--prior_loss_weight", weight)
        assert training.run(FULL, arguments, tmp_path / str(weight), *prior, "--max_train_steps", 1) == 0
        found += losses(training, tmp_path / str(weight))
    assert found[0] < found[1] and found[2] - found[1] == pytest.approx(found[1] - found[0], rel=1e-4)


# -- before the first step ---------------------------------------------------------------------------------------------


def test_problems_of_the_dataset_are_named_together_before_the_first_step(
    training, arguments, shapes_folder, tmp_path, capfd
):
    bad = tmp_path / "bad"
    shutil.copytree(shapes_folder / "train", bad)
    (bad / "00000.png").write_bytes((bad / "00000.png").read_bytes()[:80])
    with open(bad / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "a"}\n')
    (bad / "orphan.png").write_bytes((bad / "00001.png").read_bytes())
    few = ("--train_data_dir", bad, "--max_train_steps", 1)
    assert training.run(FULL, arguments, tmp_path / "out", *few) == 1
    message = capfd.readouterr().err
    assert all(word in message for word in ("00000.png", "gone.png", "orphan.png", "--on_bad_rows skip"))
    assert training.run(FULL, arguments, tmp_path / "out", *few, "--on_bad_rows", "skip") == 0
