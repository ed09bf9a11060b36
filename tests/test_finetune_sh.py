"""finetune.sh: every flag in it exists, presets included, and it runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest

import evaluate_model
import generate_images
import merge_checkpoints
import train_lora
import train_text_to_image
from finetuning import cli
from finetuning.files import check_manifest

# The two launches of the experiment log (2023-06-16 and 2023-06-29) and the tutorial's list, word for word.
SEED_COMMANDS = {
    "experiment log": """
        --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4 --dataset_name=lambdalabs/pokemon-blip-captions
        --non_ema_revision=non-ema --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=8
        --gradient_accumulation_steps=1 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-04
        --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --output_dir=out --report_to=tensorboard
        --checkpointing_steps=500 --enable_xformers_memory_efficient_attention
        --validation_prompts Brown_couch Rustic""",
    "tutorial": """
        --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --train_data_dir=datasets/chalk --use_ema
        --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
        --gradient_checkpointing --max_train_steps=150 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant
        --lr_warmup_steps=0 --output_dir=unsplash-lite-v1""",
}
# The log's LoRA runs (2023-06-03 and -04), by its repository's train script, with the rank that needed an edit then.
SEED_LORA = """
    --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --train_data_dir=datasets/chalk --resolution=512
    --random_flip --dataloader_num_workers=8 --train_batch_size=1 --gradient_accumulation_steps=4
    --max_train_steps=15000 --learning_rate=1e-04 --max_grad_norm=1 --lr_scheduler=cosine --lr_warmup_steps=0
    --output_dir=out --report_to=tensorboard --checkpointing_steps=500 --validation_prompt=Brown_couch --seed=1337
    --enable_xformers_memory_efficient_attention --rank=64"""

# Names and defaults of the official example script, August 2026.
OFFICIAL = {
    "input_perturbation": 0, "revision": None, "variant": None, "dataset_name": None, "dataset_config_name": None,
    "train_data_dir": None, "image_column": "image", "caption_column": "text", "max_train_samples": None,
    "validation_prompts": None, "output_dir": "sd-model-finetuned", "cache_dir": None, "seed": None,
    "resolution": "512", "center_crop": False, "random_flip": False, "train_batch_size": 16, "num_train_epochs": 100,
    "max_train_steps": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-4,
    "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "snr_gamma": None, "dream_training": False,
    "dream_detail_preservation": 1.0, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False,
    "offload_ema": False, "foreach_ema": False, "non_ema_revision": None, "dataloader_num_workers": 0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-08, "max_grad_norm": 1.0,
    "push_to_hub": False, "hub_token": None, "prediction_type": None, "hub_model_id": None, "logging_dir": "logs",
    "mixed_precision": None, "report_to": "tensorboard", "local_rank": -1, "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False, "noise_offset": 0, "validation_epochs": 5,
    "tracker_project_name": "text2image-fine-tune", "image_interpolation_mode": "lanczos",
}  # fmt: skip
ONLY_FULL = {
    "input_perturbation", "validation_prompts", "use_ema", "offload_ema", "foreach_ema", "non_ema_revision",
    "dream_training", "dream_detail_preservation", "tracker_project_name",
}  # fmt: skip
OFFICIAL_LORA = {name: default for name, default in OFFICIAL.items() if name not in ONLY_FULL} | {
    "output_dir": "sd-model-finetuned-lora", "validation_prompt": None, "num_validation_images": 4,
    "validation_epochs": 1, "rank": 4,
}  # fmt: skip
SCRIPTS = {"train_text_to_image.py": train_text_to_image, "train_lora.py": train_lora}


def known_flags(script):
    return cli.flags_of(script.Args)


def test_every_flag_in_finetune_sh_exists_presets_included(root):
    text = (root / "finetune.sh").read_text(encoding="utf-8")
    launch, told = text.split("# --- What to look at")
    ours = set(re.findall(r"--([a-z0-9_]+)", launch)) - {"config_file", "help", "quiet"}
    assert len(ours) > 20
    assert ours - set(known_flags(train_text_to_image)) - set(known_flags(train_lora)) == set()
    # What it prints at the end are commands of the other scripts
    merging = (flags for flags, _ in merge_checkpoints.commands().values())
    others = set().union(*map(cli.flags_of, [generate_images.Args, evaluate_model.Args, *merging]))
    assert set(re.findall(r"--([a-z0-9_]+)", told)) - others == {"logdir"}


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_the_commands_of_the_seeds_are_understood(command, root, monkeypatch):
    monkeypatch.chdir(root)
    args, problems = cli.read(train_text_to_image.Args, "", SEED_COMMANDS[command].split())
    assert problems == []
    assert args.use_ema and args.lr_warmup_steps == 0 and args.learning_rate in (1e-4, 1e-5)
    args, problems = cli.read(train_lora.Args, "", SEED_LORA.split())
    assert problems == []
    assert args.rank == 64 and args.prompts == ["Brown_couch"]


@pytest.mark.parametrize(("script", "official"), [(train_text_to_image, OFFICIAL), (train_lora, OFFICIAL_LORA)])
def test_flags_and_defaults_of_the_official_scripts_are_kept(script, official):
    ours = known_flags(script)
    assert {name: ours[name].default for name in official} == official


def test_models_that_have_left_the_hub_are_not_used(root):
    text = (root / "finetune.sh").read_text(encoding="utf-8")
    settings = re.findall(r"(?:MODEL_NAME:=|DATASET_NAME:=|SD15=)([^}\s]+)", text)
    assert settings and not [name for name in settings if name.startswith(("runwayml/", "lambdalabs/"))]


PRESETS = {"mini-sd", "sd15-t4", "sd15-lora-t4", "sd15-locon-t4", "sd14-a6000", "unsplash-lite",
           "sdxl-lora-16gb", "sdxl-lora-24gb", "sdxl-24gb", "sdxl-48gb"}  # fmt: skip


def finetune(root, **settings):
    """What finetune.sh does and says with these variables set, and none of ours besides."""
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    return subprocess.run(
        ["bash", "finetune.sh"], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )


def launch_arguments(root, **settings):
    """(script, its arguments) that finetune.sh gives to its launcher, which prints them here."""
    done = finetune(root, LAUNCH="printf %s\\0", **settings)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\0")
    return SCRIPTS[words[0]], words[1:-1]


def test_every_preset_is_understood_and_still_yields_to_the_environment(root, shapes_folder):
    for name in PRESETS:
        script, words = launch_arguments(
            root, PRESET=name, TRAIN_DIR=shapes_folder, STEPS=77, OUTPUT_DIR="some/where", RESUME="latest"
        )
        args, problems = cli.read(script.Args, "", words)
        assert problems == [], name
        assert (script is train_lora) == ("-lora" in name or name == "sd15-locon-t4")
        owner = args.pretrained_model_name_or_path.split("/")[0]
        assert owner in ("models", "stable-diffusion-v1-5", "CompVis", "stabilityai")
        assert args.size == ((64, 64) if name == "mini-sd" else (1024, 1024) if "sdxl" in name else (512, 512))
        assert (args.max_train_steps, args.output_dir) == (77, "some/where")
        assert (args.train_data_dir, args.resume_from_checkpoint) == (str(shapes_folder), "latest")


def test_more_adds_flags_and_extra_replaces_the_presets(root, shapes_folder):
    settings = {"PRESET": "sd15-t4", "TRAIN_DIR": shapes_folder}
    for name, stays in (("MORE", True), ("EXTRA", False)):
        script, words = launch_arguments(root, **settings, **{name: "--snr_gamma 5"})
        args, problems = cli.read(script.Args, "", words)
        assert problems == [] and args.snr_gamma == 5 and args.use_8bit_adam == stays, name


def test_without_a_preset_it_is_the_miniature_on_chalk(root):
    script, words = launch_arguments(root)
    assert script is train_text_to_image
    args, problems = cli.read(script.Args, "", words)
    assert problems == []
    assert (args.pretrained_model_name_or_path, args.train_data_dir) == ("models/mini-sd", "datasets/chalk")
    assert (args.size, args.train_batch_size, args.max_train_steps) == ((64, 64), 16, 500)
    assert (args.learning_rate, args.use_ema, args.ema_decay, args.cache_latents) == (5e-4, True, 0.99, "on")
    assert args.output_dir.startswith("runs/chalk-full/") and len(args.validation_prompts) == 6
    script, words = launch_arguments(root, METHOD="lora")
    args, problems = cli.read(script.Args, "", words)
    assert script is train_lora and problems == []
    assert (args.learning_rate, args.rank, args.use_ema) == (2e-3, 16, False)
    assert args.output_dir.startswith("runs/chalk-lora/")


OF_THE_SEED = {"train_data_dir", "output_dir", "checkpoints_total_limit", "validation_prompts", "validation_steps"}


@pytest.mark.parametrize(
    ("settings", "command", "besides"),
    [
        ({"PRESET": "sd14-a6000"}, SEED_COMMANDS["experiment log"], {"dataset_name", "seed"}),
        ({"PRESET": "sd15-lora-t4", "RANK": 64}, SEED_LORA,
         {"pretrained_model_name_or_path", "save_kohya", "validation_prompt", "num_validation_images"}),
    ],
)  # fmt: skip
def test_a_preset_is_the_run_of_the_experiment_log(root, shapes_folder, settings, command, besides):
    script, words = launch_arguments(root, TRAIN_DIR=shapes_folder, **settings)
    args, _ = cli.read(script.Args, "", words)
    wanted, _ = cli.read(script.Args, "", command.split())
    different = {name for name, value in cli.as_dict(wanted).items() if getattr(args, name) != value}
    assert different == OF_THE_SEED | besides


def test_a_value_that_does_not_exist_is_named(root):
    done = finetune(root, METHOD="dreambooth")
    assert (done.returncode, done.stdout) == (2, "")
    assert "METHOD=dreambooth must be full or lora" in done.stderr
    done = finetune(root, PRESET="sd15", TRAIN_DIR="photos")
    assert (done.returncode, done.stdout) == (2, "")
    assert "PRESET=sd15 does not exist" in done.stderr
    assert set(done.stderr.split("known: ")[1].split()) == PRESETS


@pytest.mark.parametrize("own", [{"TRAIN_DIR": "photos"}, {"DATASET_NAME": "someone/photos"}])
def test_own_images_do_not_train_the_miniature_unasked(root, own):
    done = finetune(root, **own)
    assert (done.returncode, done.stdout) == (2, "")
    assert "models/mini-sd knows only coloured shapes" in done.stderr
    assert all(name in done.stderr for name in PRESETS)
    assert launch_arguments(root, **own, MODEL_NAME="models/mini-sd")[0] is train_text_to_image


def test_the_rank_of_a_lora_is_not_taken_for_the_number_of_a_process(root):
    environment = finetune(root, METHOD="lora", RANK=8, LAUNCH="bash -c env").stdout.splitlines()
    assert "METHOD=lora" in environment and not [line for line in environment if line.startswith("RANK=")]
    _, words = launch_arguments(root, METHOD="lora", RANK=8)
    assert words[words.index("--rank") + 1] == "8"


def test_a_preset_for_a_real_model_asks_for_images(root):
    done = finetune(root, PRESET="sd15-t4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "PRESET=sd15-t4 needs TRAIN_DIR=" in done.stderr


def test_the_output_is_named_after_the_images_and_the_preset(root):
    for data in ({"TRAIN_DIR": "some/photos/"}, {"DATASET_NAME": "someone/photos"}):
        _, words = launch_arguments(root, PRESET="sd15-t4", **data)
        assert words[words.index("--output_dir") + 1].startswith("runs/photos-sd15-t4/2")


def test_the_printed_commands_survive_spaces_and_quotes(root, tmp_path):
    images, output = tmp_path / "my 'photos'", tmp_path / 'a "b" $c'
    (images / "validation").mkdir(parents=True)
    for name in ("one.png", "two.png", "metadata.jsonl"):
        (images / "validation" / name).touch()
    printed = finetune(root, PRESET="sd15-t4", TRAIN_DIR=images, OUTPUT_DIR=output, LAUNCH="true").stdout
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  python ")]
    generate, evaluate, merge = commands
    assert f"tuned={output}" in generate and generate[generate.index("--prompt") + 1].startswith("A modern living room")
    assert evaluate[evaluate.index("--dataset") + 1] == str(images)
    assert evaluate[evaluate.index("--split") + 1] == "validation"
    assert merge[merge.index("--output_dir") + 1] == f"{output}-merged"


@pytest.mark.parametrize(
    ("images", "split"),
    [
        (["validation/1.png", "validation/2.png"], "--split validation"),
        (["Val/1.png", "Val/below/2.png", "train/3.png"], "--split validation"),
        (["val/1.png", "val/metadata.jsonl", "training/2.png"], "--split train"),  # one image has no interval
        (["1.png", "dev/2.png"], "--split train"),
        (["1.png", "my val/2.png", "my val/3.png"], ""),
    ],
)
def test_the_printed_evaluation_names_a_split_that_is_there(root, tmp_path, images, split):
    for name in images:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    printed = finetune(root, PRESET="sd15-t4", TRAIN_DIR=tmp_path, OUTPUT_DIR=tmp_path / "out", LAUNCH="true").stdout
    (line,) = [line for line in printed.splitlines() if "evaluate_model.py" in line]
    assert (split in line) if split else ("--split" not in line)


def test_a_failure_ends_with_our_message_and_not_with_the_launchers(root, tiny_model, tmp_path):
    done = finetune(root, MODEL_NAME=tiny_model, TRAIN_DIR=tmp_path / "nothing", OUTPUT_DIR=tmp_path / "run")
    assert done.returncode == 1
    assert "there is no such folder" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_sigterm_to_the_script_reaches_the_training_process_which_saves(root, tiny_model, shapes_folder, tmp_path):
    settings = {"MODEL_NAME": tiny_model, "TRAIN_DIR": shapes_folder, "OUTPUT_DIR": tmp_path, "RESOLUTION": 32}
    settings |= {"STEPS": 100_000, "BATCH": 2, "CHECKPOINTING_STEPS": 100_000, "VALIDATION_STEPS": 100_000}
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    with subprocess.Popen(
        ["bash", "finetune.sh"], cwd=root, env=environment, stderr=subprocess.PIPE, text=True
    ) as script:
        while (
            not (tmp_path / "metrics.jsonl").is_file() or "train_loss" not in (tmp_path / "metrics.jsonl").read_text()
        ):
            assert script.poll() is None, script.stderr.read()
            time.sleep(0.05)
        script.terminate()
        message = script.communicate(timeout=120)[1]
    assert script.returncode != 0
    assert "this run is in fp32" in message  # accelerate_config.yaml says fp16
    assert "--resume_from_checkpoint latest goes on" in message
    [checkpoint] = tmp_path.glob("checkpoint-*")
    check_manifest(checkpoint)


def test_method_lora_trains_adapters_and_says_how_to_generate_with_them(root, tiny_model, shapes_folder, tmp_path):
    settings = {
        "METHOD": "lora", "MODEL_NAME": tiny_model, "TRAIN_DIR": shapes_folder, "OUTPUT_DIR": tmp_path, "STEPS": 2,
        "RESOLUTION": 32, "BATCH": 2, "RANK": 2, "TARGETS": "all-linear conv",
        "EXTRA": "--validation_inference_steps 1 --save_kohya", "LAUNCH": sys.executable,
    }  # fmt: skip
    done = finetune(root, **settings)
    assert done.returncode == 0, done.stderr
    assert "load_lora_weights loads it" in done.stderr
    [command] = re.findall(r"python generate_images.py (.*)", done.stdout)
    assert f"--lora {tmp_path} --lora_scale 0 0.5 0.8 1" in command
    generated = tmp_path.with_name(f"{tmp_path.name}-generated")  # not inside the LoRA's folder, which is read
    less = ["--size", "32", "--num_inference_steps", "1", "--output_dir", str(generated)]
    assert generate_images.main([*shlex.split(command), *less]) == 0
    assert (tmp_path / "kohya_lora_weights.safetensors").is_file() and (generated / "grid.png").is_file()


def test_it_runs_with_variables_from_the_environment(root, tiny_model, shapes_folder, tmp_path):
    settings = {
        "MODEL_NAME": tiny_model, "TRAIN_DIR": shapes_folder, "OUTPUT_DIR": tmp_path, "RESOLUTION": 32, "BATCH": 2,
        "STEPS": 2, "LR": "1e-5", "NON_EMA_VARIANT": "non_ema", "EMA_DECAY": 0.5,
        "EXTRA": "--validation_inference_steps 1", "LAUNCH": sys.executable,
    }  # fmt: skip
    done = finetune(root, **settings)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/comparison.png" in done.stdout
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["max_train_steps"], args["learning_rate"], args["ema_decay"]) == (2, 1e-5, 0.5)
    assert (tmp_path / "comparison.png").is_file() and list((tmp_path / "logs").rglob("events*"))
