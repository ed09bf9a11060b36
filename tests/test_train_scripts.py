"""Every train_*.py, run as a user runs it, held to the same invariants."""

import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetuning import files
from finetuning.training.checkpoint import checkpoints_in

FULL = pytest.mark.parametrize("script", ["train_text_to_image"])
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS = 8


@pytest.fixture
def arguments(tiny_model, shapes_folder):
    """11 rows in groups of 4: three steps an epoch, the last of 3 rows. Everything that draws is switched on."""
    return f"""
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps {STEPS} --seed 3
        --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --use_ema --ema_decay 0.9 --train_text_encoder
        --random_flip --proportion_empty_prompts 0.3 --noise_offset 0.05 --input_perturbation 0.1 --snr_gamma 5
        --checkpointing_steps 2 --validation_epochs 0 --report_to none
    """.split()


def train(script, arguments, output_dir, *more):
    """Run the script in this process; its exit status."""
    return importlib.import_module(script).main([*arguments, "--output_dir", str(output_dir), *map(str, more)])


def in_child(work):
    """Start `work()` in a forked child, which needs no second import; returns its process id."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def steps(folder):
    """The lines of metrics.jsonl that training steps wrote; validation writes others."""
    return [line for line in metrics(folder) if "train_loss" in line]


def state(folder, step=STEPS):
    """All that a run computed: pipeline or LoRA, checkpoint with EMA, optimizer, logged losses."""
    folder = Path(folder)
    weights = {
        f"{path.relative_to(folder)}": files.sha256(path)
        for depth in ("*", "*/*", f"checkpoint-{step}/*/*")
        for path in folder.glob(f"{depth}.safetensors")
    }
    optimizer = torch.load(folder / f"checkpoint-{step}/optimizer.pt", weights_only=True)
    return weights, repr_tensors(optimizer), metrics(folder)


def repr_tensors(value):
    """Nested containers with every tensor as its exact bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: repr_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [repr_tensors(item) for item in value]
    return value


def assert_same(first, second):
    """Compared part by part, so that a failure says what differs."""
    for name, one, other in zip(("weights", "optimizer", "metrics"), first, second, strict=True):
        assert one == other, f"{name} differ"


@pytest.fixture
def straight(script, arguments, tmp_path):
    """A run that was never interrupted, with a checkpoint at every step."""
    folder = tmp_path / "straight"
    assert train(script, arguments, folder, "--checkpointing_steps", 1) == 0
    return folder


@pytest.mark.parametrize("stopped_at", [1, 3, 5])  # the first step, the end of an epoch, the middle of one
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(script, arguments, straight, tmp_path, stopped_at):
    resumed = tmp_path / "resumed"
    for name in (f"checkpoint-{stopped_at}", "validation"):
        shutil.copytree(straight / name, resumed / name)
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[: stopped_at + 2]))  # two steps were logged, then lost
    assert train(script, arguments, resumed, "--resume_from_checkpoint", "latest") == 0
    assert_same(state(resumed), state(straight))


def test_8_bit_adam_resumes_exactly(script, arguments, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(script, arguments, straight, "--use_8bit_adam") == 0
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    assert train(script, arguments, resumed, "--use_8bit_adam", "--resume_from_checkpoint", "checkpoint-4") == 0
    assert state(resumed)[:2] == state(straight)[:2]


def test_cached_latents_train_the_same_and_resume_exactly(script, arguments, tmp_path):
    """The cache encodes 16 rows at once and not 2, which may change the last bits, but nothing else."""
    cut = ("--center_crop", "--checkpointing_steps", 1)
    fresh, cached, resumed = (tmp_path / name for name in ("fresh", "cached", "resumed"))
    assert train(script, arguments, fresh, *cut) == 0
    assert train(script, arguments, cached, *cut, "--cache_latents") == 0
    losses = [[line["train_loss"] for line in steps(folder)] for folder in (fresh, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    shutil.copytree(cached / "checkpoint-5", resumed / "checkpoint-5")
    assert train(script, arguments, resumed, *cut, "--cache_latents", "--resume_from_checkpoint", "latest") == 0
    assert state(resumed)[:2] == state(cached)[:2]


def test_with_square_images_buckets_change_nothing(script, arguments, straight, tmp_path):
    assert train(script, arguments, tmp_path / "buckets", "--aspect_buckets", "--bucket_step", 8) == 0
    assert_same(state(tmp_path / "buckets"), state(straight))


@pytest.fixture
def bucketed(shapes_folder, tmp_path):
    """11 rows in three buckets, groups of 4: 7 rows as 4 + 3, two of 2 rows; the held out rows in two."""
    folder = tmp_path / "shapes"
    shutil.copytree(shapes_folder, folder)
    sizes = {"00001": (64, 40), "00004": (64, 40), "00006": (40, 64), "00010": (40, 64)}  # width, height
    for path in folder.rglob("*.png"):
        if path.stem in sizes:
            Image.open(path).resize(sizes[path.stem]).save(path)
    return f"--train_data_dir {folder} --aspect_buckets --bucket_step 8".split()


@pytest.mark.parametrize("latents", ["", "--center_crop --cache_latents"])
def test_buckets_train_and_resume_exactly(script, arguments, bucketed, tmp_path, latents, capfd):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    arguments = [*arguments, *bucketed, *latents.split()]
    assert train(script, arguments, straight, "--checkpointing_steps", 1) == 0
    said = capfd.readouterr().err
    assert "3 buckets, height x width: rows: 32x32: 7; 24x40: 2; 40x24: 2" in said
    assert "buckets: 3, and every step is of one: 3 of the 4 steps of an epoch have fewer than 4 rows" in said
    for name in ("checkpoint-3", "validation"):
        shutil.copytree(straight / name, resumed / name)
    shutil.copy(straight / "metrics.jsonl", resumed)
    assert train(script, arguments, resumed, "--resume_from_checkpoint", "latest") == 0
    assert_same(state(resumed), state(straight))


def test_cached_latents_of_buckets_train_the_same(script, arguments, bucketed, tmp_path):
    few = (*bucketed, "--center_crop", "--max_train_steps", 5, "--checkpointing_steps", 0)
    for name, more in (("fresh", ()), ("cached", ("--cache_latents",))):
        assert train(script, arguments, tmp_path / name, *few, *more) == 0
    losses = [[line["train_loss"] for line in steps(tmp_path / name)] for name in ("fresh", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_other_buckets_on_resume_are_named(script, arguments, bucketed, tmp_path, capfd):
    assert train(script, arguments, tmp_path / "out", *bucketed, "--max_train_steps", 2) == 0
    other = ("--max_side", 32, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    assert train(script, arguments, tmp_path / "out", *bucketed, *other) == 0
    changes = capfd.readouterr().err.split("these have changed")[1].splitlines()[0]
    assert "--max_side None -> 32" in changes and "the dataset's rows, captions or buckets" in changes


def test_killed_at_random_moments_and_inside_saves_nothing_is_lost(script, arguments, straight, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    sync = files._sync
    monkeypatch.setattr(files, "_sync", lambda path: (time.sleep(0.005), sync(path)))  # a slow disk: long saves
    rng = random.Random(0)
    more = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest")
    work = lambda: train(script, arguments, folder, *more)
    newest = lambda: max((step for step, _ in checkpoints_in(folder)), default=0)
    saving = lambda: any(folder.glob(f"{files.ASIDE}checkpoint-*"))

    killed_in_save = 0
    for new_checkpoints, in_save in [(0, True), (1, False), (0, True), (2, False), (1, True), (0, False)]:
        done, child = newest(), in_child(work)
        while newest() < done + new_checkpoints or (in_save and not saving()):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        killed_in_save += saving()
    assert killed_in_save >= 1
    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0
    assert not saving()
    assert_same(state(folder), state(straight))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_a_checkpoint_first(script, arguments, straight, tmp_path, number, capfd):
    folder = tmp_path / "stopped"
    child = in_child(lambda: train(script, arguments, folder, "--checkpointing_steps", 0))
    while len(steps(folder)) < 2:
        time.sleep(0.001)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{len(steps(folder))}"]
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err
    assert train(script, arguments, folder, "--resume_from_checkpoint", "latest") == 0
    assert_same(state(folder), state(straight))


def test_a_loss_that_is_not_finite_stops_the_run_and_reaches_no_checkpoint(script, arguments, tmp_path, capfd, tensors):
    rates = ("--learning_rate", "1e30", "--lr_scheduler", "constant", "--max_grad_norm", 0)
    assert train(script, arguments, tmp_path, *rates) == 1
    message = capfd.readouterr().err
    assert "NonFinite" in message and "metadata.jsonl line" in message
    assert not (tmp_path / "model_index.json").exists()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert all(t.isfinite().all() for part in tensors(checkpoint).values() for t in part.values())


def test_accumulation_and_batch_size_are_interchangeable(script, arguments, tmp_path, tensors):
    cuts = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}
    for name, (batch, accumulation) in cuts.items():
        size = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        assert train(script, arguments, tmp_path / name, *size) == 0
    losses = {name: [line["train_loss"] for line in steps(tmp_path / name)] for name in cuts}
    assert losses["2x2"] == pytest.approx(losses["4x1"], rel=1e-5)
    assert losses["1x4"] == pytest.approx(losses["4x1"], rel=1e-5)


def test_two_processes_train_as_one_with_the_same_global_batch(script, arguments, root, tmp_path, tensors):
    plain = ("--learning_rate", "1e-4", "--max_train_steps", 4)
    assert train(script, arguments, tmp_path / "one", *plain) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", f"{script}.py"]
    command += [*arguments, *map(str, plain), "--gradient_accumulation_steps", "1", "--output_dir", tmp_path / "two"]
    # fp16 as in the shipped accelerate_config.yaml: asking whether there is a GPU must not make the processes one
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "fp16"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "two/args.json").read_text())
    assert facts["run"]["processes"] == 2  # `accelerate launch --cpu --num_processes 2` was seen to start one
    one, two = tensors(tmp_path / "one/checkpoint-4"), tensors(tmp_path / "two/checkpoint-4")
    for part, weights in one.items():
        for name, value in weights.items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=1e-6, msg=f"{part} {name}")


def test_max_train_steps_is_exact_also_after_a_resume(script, arguments, tmp_path):
    assert train(script, arguments, tmp_path, "--max_train_steps", 5) == 0
    assert train(script, arguments, tmp_path, "--max_train_steps", 7, "--resume_from_checkpoint", "latest") == 0
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, 8))
    assert (tmp_path / "checkpoint-7").is_dir()


def test_epochs_decide_where_no_steps_are_given(script, arguments, tmp_path):
    cut = arguments.index("--max_train_steps")
    arguments = arguments[:cut] + arguments[cut + 2 :]
    assert train(script, arguments, tmp_path, "--num_train_epochs", 2, "--checkpointing_steps", 0) == 0
    assert len(steps(tmp_path)) == 6  # three steps an epoch


def test_checkpoints_by_epochs_and_their_limit(script, arguments, tmp_path):
    (tmp_path / "checkpoint-best").mkdir()  # somebody else's folder does no harm and stays
    by_epoch = ("--checkpointing_steps", 0, "--checkpointing_epochs", 1, "--checkpoints_total_limit", 2)
    assert train(script, arguments, tmp_path, *by_epoch) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-best",
    ]


def test_checkpoints_by_the_clock(script, arguments, tmp_path):
    assert train(script, arguments, tmp_path, "--checkpointing_steps", 0, "--checkpointing_minutes", 1e-9) == 0
    assert len(list(tmp_path.glob("checkpoint-*"))) == STEPS


def test_latest_passes_over_a_broken_checkpoint_and_a_named_one_is_refused(
    script, arguments, straight, tmp_path, capfd
):
    broken = straight / f"checkpoint-{STEPS}" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert train(script, arguments, straight, "--resume_from_checkpoint", f"checkpoint-{STEPS}") == 1
    assert "optimizer.pt" in capfd.readouterr().err
    assert train(script, arguments, straight, "--resume_from_checkpoint", "latest") == 0
    message = capfd.readouterr().err
    assert "optimizer.pt" in message and f"checkpoint-{STEPS - 1}" in message


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(script, arguments, tmp_path, capfd):
    assert train(script, arguments, tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", 1) == 0
    assert "starting afresh" in capfd.readouterr().err


def test_a_named_checkpoint_may_be_a_path_with_a_slash_or_lie_elsewhere(script, arguments, straight, tmp_path, capfd):
    there = f"{straight}/checkpoint-5/"
    assert train(script, arguments, tmp_path / "elsewhere", "--resume_from_checkpoint", there) == 0
    assert state(tmp_path / "elsewhere")[:2] == state(straight)[:2]
    assert train(script, arguments, tmp_path / "elsewhere", "--resume_from_checkpoint", "checkpoint-99") == 1
    assert "checkpoint-99" in capfd.readouterr().err


def test_an_output_dir_with_checkpoints_is_not_trained_over(script, arguments, straight, capfd):
    assert train(script, arguments, straight) == 1
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(script, arguments, straight, capfd):
    """Else latest would go back to the branch that was left, and the limit would delete the new checkpoints first."""
    again = ("--resume_from_checkpoint", "checkpoint-3", "--checkpoints_total_limit", 2)
    assert train(script, arguments, straight, "--max_train_steps", 6, *again) == 0
    assert "checkpoint-7 comes after the one resumed from: set aside" in capfd.readouterr().err
    assert [path.name for _, path in checkpoints_in(straight)] == ["checkpoint-4", "checkpoint-6"]
    assert len(list(straight.glob("abandoned-checkpoint-*"))) == STEPS - 3


def test_a_run_that_is_already_longer_is_refused(script, arguments, straight, capfd):
    assert train(script, arguments, straight, "--max_train_steps", 5, "--resume_from_checkpoint", "latest") == 1
    assert "8 steps done and this run would end at 5" in capfd.readouterr().err
    assert (straight / "checkpoint-8").is_dir()


def test_the_state_of_another_optimizer_is_refused(script, arguments, straight, capfd):
    assert train(script, arguments, straight, "--use_8bit_adam", "--resume_from_checkpoint", "checkpoint-5") == 1
    assert "another optimizer" in capfd.readouterr().err


def test_adding_ema_on_resume_is_refused(script, arguments, tmp_path, capfd):
    without = [word for word in arguments if word not in ("--use_ema", "--ema_decay", "0.9")]
    assert train(script, without, tmp_path) == 0
    assert train(script, arguments, tmp_path, "--resume_from_checkpoint", "checkpoint-4") == 1
    assert "without --use_ema" in capfd.readouterr().err


def test_changed_arguments_are_named_on_resume(script, arguments, straight, capfd):
    changed = ("--resume_from_checkpoint", "checkpoint-5", "--learning_rate", 0, "--adam_weight_decay", 0.5)
    before = state(straight, 5)[0]
    shutil.rmtree(straight / f"checkpoint-{STEPS}")
    assert train(script, arguments, straight, *changed) == 0
    message = capfd.readouterr().err
    assert "--learning_rate 0.001 -> 0.0" in message and "--adam_weight_decay 0.01 -> 0.5" in message
    assert "--output_dir" not in message.split("these have changed")[1].splitlines()[0]
    # and the new learning rate is really used: with 0 the weights stay where they are
    trained = lambda weights, step: {n: h for n, h in weights.items() if n.startswith(f"checkpoint-{step}/")
                                     and "_ema" not in n}  # fmt: skip
    assert [*trained(state(straight)[0], STEPS).values()] == [*trained(before, 5).values()] != []


@FULL
def test_the_pipeline_loads_holds_both_weights_and_leaves_the_rest_untouched(script, arguments, tiny_model, tmp_path):
    arguments = [word for word in arguments if word != "--train_text_encoder"]
    assert train(script, arguments, tmp_path, "--prediction_type", "v_prediction") == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline("a red circle", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in (tiny_model / part).iterdir():
            assert (tmp_path / part / path.name).read_bytes() == path.read_bytes()
            assert (tmp_path / part / path.name).stat().st_mode & 0o777 == 0o666 & ~files._umask()
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    unet = tmp_path / "unet"
    assert files.sha256(unet / "diffusion_pytorch_model.safetensors") == files.sha256(
        tmp_path / f"checkpoint-{STEPS}/unet_ema/diffusion_pytorch_model.safetensors"
    )
    assert files.sha256(unet / "diffusion_pytorch_model.non_ema.safetensors") == files.sha256(
        tmp_path / f"checkpoint-{STEPS}/unet/diffusion_pytorch_model.safetensors"
    )


@FULL
def test_weights_loaded_apart_keep_their_share_in_the_average(script, arguments, tiny_model, tmp_path, tensors):
    """With a learning rate of 0 the trained weights stay the raw ones, so the average is known exactly."""
    decay = 0.9
    apart = ("--non_ema_variant", "non_ema", "--learning_rate", 0)
    assert train(script, arguments, tmp_path, *apart) == 0
    base = tensors(tiny_model)
    main, raw = (
        base["unet/diffusion_pytorch_model.safetensors"],
        base["unet/diffusion_pytorch_model.non_ema.safetensors"],
    )
    result = tensors(tmp_path)["unet/diffusion_pytorch_model.safetensors"]
    for name, value in result.items():
        expected = decay**STEPS * main[name] + (1 - decay**STEPS) * raw[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_validation_draws_the_base_first_and_logs_images_and_losses(script, arguments, tmp_path):
    looks = ["--validation_prompts", "a red circle", "a blue square", "--validation_steps", "4"]
    looks += ["--validation_inference_steps", "2", "--report_to", "tensorboard"]
    assert train(script, arguments, tmp_path, *looks) == 0
    drawn = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert drawn == ["base_losses.json", "step-0", "step-4", "step-8"]
    assert (tmp_path / "comparison.png").is_file()
    losses = {line["step"]: line for line in metrics(tmp_path) if "validation_loss" in line}
    assert sorted(losses) == [0, 4, 8] and losses[8]["validation_loss_change_95"] > 0
    change = losses[8]["validation_loss"] - losses[0]["validation_loss"]
    assert losses[8]["validation_loss_change"] == pytest.approx(change, abs=1e-6)
    [log] = {path.parent for path in (tmp_path / "logs").rglob("events*") if path.parent.name == "text2image-fine-tune"}
    events = EventAccumulator(str(log)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, STEPS + 1))
    assert {"lr", "grad_norm", "validation_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("validation/1")] == [0, 4, 8]


def test_looking_does_not_change_what_is_trained(script, arguments, straight, tmp_path):
    looks = ["--validation_prompts", "a red circle", "--validation_steps", "2", "--validation_inference_steps", "1"]
    assert train(script, arguments, tmp_path / "looked", *looks) == 0
    assert state(tmp_path / "looked")[:2] == state(straight)[:2]


def test_gradients_are_clipped_and_their_norm_before_is_logged(script, arguments, tmp_path, tensors):
    """Plain Adam hides the gradient's size, so the clip is seen in Adam's first moment."""
    assert train(script, arguments, tmp_path, "--max_train_steps", 1, "--max_grad_norm", 1e-4) == 0
    assert steps(tmp_path)[0]["grad_norm"] > 1e-2
    moments = torch.load(tmp_path / "checkpoint-1/optimizer.pt", weights_only=True)["optimizer"]["state"]
    norm = torch.stack([one["exp_avg"].norm() / (1 - 0.9) for one in moments.values()]).norm().item()
    assert norm == pytest.approx(1e-4, rel=1e-2)


WAYS = """
    --optimizer adafactor
    --optimizer prodigy --learning_rate 1
    --loss_type huber
    --dream_training
    --prediction_type sample
    --gradient_checkpointing
    --offload_ema --foreach_ema
    --allow_tf32
    --random_resized_crop_scale 0.5
    --resolution 32x40
    --center_crop --image_interpolation_mode bicubic
    --center_crop --cache_latents
    --enable_xformers_memory_efficient_attention
    --dataloader_num_workers 2
    --text_encoder_lr 1e-5
    --mixed_precision fp16
    --mixed_precision bf16
    --validation_fraction 0.2 --max_train_samples 6
    --caption_column none
    --scale_lr --report_to all
"""
OWN_WAYS = {
    "train_text_to_image": "--from_scratch --unet_config '{layers_per_block: 2}'",
    "train_lora": """
        --use_8bit_adam
        --use_dora
        --use_rslora --lora_alpha 3 --text_encoder_rank 2
        --lora_target_modules all-linear conv --save_kohya
        --lora_rank_pattern attn2.to_k=8 'mid_block.*=3' --lora_alpha_pattern to_v=1
        --lora_dropout 0.3 --gradient_checkpointing
        --base_precision nf4
        --base_precision int8
        --base_precision nf4 --use_dora
        --mixed_precision bf16 --base_precision bf16
        --mixed_precision bf16 --base_precision fp32
    """,
}


def test_every_script_has_its_own_ways(training_scripts):
    assert sorted(OWN_WAYS) == [path.stem for path in training_scripts]


def every_way():
    for script, own in OWN_WAYS.items():
        for line in (WAYS + own).strip().splitlines():
            if line.strip():
                yield script, line.strip()


@pytest.mark.parametrize(("script", "flags"), list(every_way()))
def test_every_way_of_training_trains(script, arguments, tmp_path, tiny_model, flags, tensors):
    assert train(script, arguments, tmp_path, "--max_train_steps", 2, *shlex.split(flags)) == 0
    if script == "train_lora":  # what is behind an adapter starts at zero
        after = tensors(tmp_path)["pytorch_lora_weights.non_ema.safetensors"]
        after = {name: value for name, value in after.items() if "lora_B" in name}
        changed = [name for name, value in after.items() if value.any()]
    else:
        before = tensors(tiny_model)["unet/diffusion_pytorch_model.safetensors"]
        after = tensors(tmp_path)["unet/diffusion_pytorch_model.non_ema.safetensors"]
        changed = [name for name in after if name not in before or not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * len(after)
    assert all(value.isfinite().all() for value in after.values())


def test_a_resolution_that_does_not_fit_the_autoencoder_is_refused(script, arguments, tmp_path, capfd):
    assert train(script, arguments, tmp_path, "--resolution", 36) == 1
    assert "--resolution 36" in capfd.readouterr().err


def test_faults_of_the_dataset_are_named_together_before_the_first_step(
    script, arguments, shapes_folder, tmp_path, capfd
):
    bad = tmp_path / "bad"
    shutil.copytree(shapes_folder / "train", bad)
    (bad / "00000.png").write_bytes((bad / "00000.png").read_bytes()[:80])
    with open(bad / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "a"}\n')
    (bad / "orphan.png").write_bytes((bad / "00001.png").read_bytes())
    assert train(script, arguments, tmp_path / "out", "--train_data_dir", bad) == 1
    message = capfd.readouterr().err
    assert all(word in message for word in ("3 faults", "00000.png", "gone.png", "orphan.png", "--on_bad_rows skip"))
    assert train(script, arguments, tmp_path / "out", "--train_data_dir", bad, "--on_bad_rows", "skip") == 0


def test_args_json_repeats_the_run_as_a_config(script, arguments, tmp_path):
    assert train(script, arguments, tmp_path / "first") == 0
    again = ["--config", str(tmp_path / "first/args.json")]
    assert train(script, again, tmp_path / "again") == 0
    assert state(tmp_path / "again") == state(tmp_path / "first")


def test_a_seed_that_was_drawn_is_kept_on_resume(script, arguments, tmp_path):
    cut = arguments.index("--seed")
    arguments = arguments[:cut] + arguments[cut + 2 :]
    assert train(script, arguments, tmp_path / "straight") == 0
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "straight/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    assert train(script, arguments, tmp_path / "resumed", "--resume_from_checkpoint", "latest") == 0
    assert state(tmp_path / "resumed")[:2] == state(tmp_path / "straight")[:2]


def test_the_script_runs_under_accelerate_launch_as_in_the_seeds(script, arguments, root, tmp_path):
    launcher = Path(sys.executable).with_name("accelerate")
    command = [launcher, "launch", "--mixed_precision=fp16", f"{script}.py", *arguments, "--max_train_steps", "1"]
    done = subprocess.run([*command, "--output_dir", tmp_path], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "this run is in fp32" in done.stderr
    result = {"train_text_to_image": "model_index.json", "train_lora": "pytorch_lora_weights.safetensors"}[script]
    assert (tmp_path / result).is_file()
