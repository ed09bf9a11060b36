"""Broken inputs x the scripts that could meet them: whatever it is, one clear message and nothing else.

A row of BROKEN is an input with one thing wrong. It is tried on every command of COMMANDS that names its kind, all else
being sound: a new bad input is one line, and so is a new command. Every cell ends with status 1 or 2, says the words of
its row, shows no traceback and leaves the inputs as they were.
"""

import importlib
import json
import os
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.lora_files import DIFFUSERS_NAME, METADATA_KEY, Layer, write_diffusers
from finetuning.shapes.write_dataset import write as write_shapes

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# {kind} is the broken input, or a sound one; {other_kind} always a sound one. Kinds of models are those of which all is
# used (pipeline), the weights (weights), the configurations (layout), the tokenizer; kinds of datasets those of
# which images and rows are used (data), the images (images), the rows (rows)
TRAIN = (
    "--pretrained_model_name_or_path {pipeline} --train_data_dir {data} --resolution 32 --train_batch_size 1 --seed 0 "
    "--max_train_steps 1 --validation_epochs 0 --validation_loss_rows 0 --report_to none --output_dir {output}"
)
GENERATE = "generate_images --prompt a --num_inference_steps 1 --size 32 --guidance_scale 1 --output_dir {output}"
EVALUATE = (
    "evaluate_model --dataset {data} --retain_dataset {data} --split validation --max_rows 2 "
    "--num_inference_steps 1 --guidance_scale 1 "
    "--size 32 --checker finetuning.shapes.checker --general_prompts none --no-noise_floor --output_dir {output}"
)
SWEEP = "sweep --prompts_in a --prompts_out b --num_inference_steps 1 --size 32 --ratios 0 1 --output_dir {output}"
LORA = "--base {layout} --output_dir {output} --lora {lora}"
COMMANDS = {
    "train": f"train_text_to_image {TRAIN}",
    "train_lora": f"train_lora {TRAIN} --init_lora {{lora}} --lora_target_modules attention",
    "generate": f"{GENERATE} --model a={{other_pipeline}} b={{pipeline}} --lora {{lora}}",
    "evaluate": f"{EVALUATE} --model a={{other_pipeline}} b={{pipeline}} --lora c={{lora}}",
    "merge": "merge_checkpoints --base {weights} --tuned {other_weights} --output_dir {output}",
    "merge into": "merge_checkpoints --base {other_weights} --tuned {weights} --output_dir {output}",
    "sweep": f"merge_checkpoints {SWEEP} --base {{pipeline}} --tuned {{other_weights}}",
    "fuse": "merge_checkpoints fuse --base {weights} --lora {lora} --output_dir {output}",
    "extract": "merge_checkpoints extract --base {weights} --tuned {other_weights} --rank 2 --output_dir {output}",
    "resize": f"merge_checkpoints resize --rank 1 {LORA}",
    "combine": f"merge_checkpoints combine {LORA} {{other_lora}}",
    "convert": f"merge_checkpoints convert --to kohya {LORA}",
    "check": "prepare_dataset check {data} --tokenizer {tokenizer}",
    "imagefolder": "prepare_dataset convert imagefolder {data} --output {output}",
    "augment": "prepare_dataset augment {data} --output {output}",
    "captions": "prepare_dataset captions {rows} --prefix a --output {output}",
    "caption": "caption_images {images} --captioner git --model {captioner} --overwrite --num_beams 1 --max_length 6",
}
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


# -- what can be done to an input: each takes its path, and may return another -----------------------------------------


def content(file, change):
    """The bytes of a file, changed."""

    def damage(folder):
        path = folder / file
        before = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)  # a link to the sound one
        path.write_bytes(change(before) if callable(change) else change)

    return damage


def tensors(file, change=lambda found: None, **metadata):
    """The tensors of a file, changed, or its metadata."""

    def damage(folder):
        found = load_file(folder / file)
        change(found)
        (folder / file).unlink()
        save_file({key: value.contiguous() for key, value in found.items()}, folder / file, {"format": "pt"} | metadata)

    return damage


def value(key, change):
    return lambda found: found.update({key: change(found[key])})


def settings(file, **changes):
    return content(file, lambda before: json.dumps(json.loads(before) | changes).encode())


def gone(file):
    return lambda folder: (folder / file).unlink()


def moved(file, to):
    return lambda folder: (folder / file).rename(folder / to) and None


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages] and None


def is_file(name):
    """The input is a file inside what would be the input."""
    return lambda folder: folder / name


CUT = lambda before: before[: len(before) // 2]
NAN = lambda tensor: tensor * float("nan")
WHOLE, MODEL, LAYOUT = "pipeline", "pipeline weights", "pipeline weights layout"
DATA, ROWS = "data images rows", "data rows"

BROKEN = {
    # name: (kinds, what is done, words of the message ...)
    # Models: weights
    "UNet lacks a tensor": (MODEL, tensors(UNET, lambda t: t.pop("conv_in.bias")), UNET, "conv_in.bias"),
    "text encoder lacks a tensor": (
        MODEL, tensors(TEXT, lambda t: t.pop("text_model.final_layer_norm.bias")), TEXT, "final_layer_norm.bias"),
    "autoencoder lacks a tensor": (
        MODEL, tensors(VAE, lambda t: t.pop("decoder.conv_in.bias")), VAE, "decoder.conv_in.bias"),
    "UNet of another shape": (MODEL, tensors(UNET, value("conv_in.weight", lambda one: one[:4])), UNET),
    "UNet with a strange tensor": (MODEL, tensors(UNET, lambda t: t.update(more=torch.zeros(2))), UNET, "more"),
    "UNet of NaN": (MODEL, tensors(UNET, value("conv_in.bias", NAN)), UNET, "conv_in.bias"),
    "autoencoder of NaN": (WHOLE, tensors(VAE, value("quant_conv.bias", NAN)), VAE, "quant_conv.bias"),
    "text encoder of NaN": (
        MODEL, tensors(TEXT, value("text_model.final_layer_norm.bias", NAN)), TEXT, "final_layer_norm.bias"),
    "quantised UNet": (
        MODEL, tensors(UNET, value("conv_in.weight", lambda one: one.to(torch.int8))), UNET, "quantised"),
    "quantised text encoder": (
        MODEL, tensors(TEXT, lambda t: t.update({"text_model.x.weight.absmax": torch.zeros(2)})), TEXT, "quantised"),
    "saved with adapters": (
        MODEL, tensors(UNET, lambda t: t.update({"conv_in.base_layer.bias": t.pop("conv_in.bias")})), UNET, "adapters"),
    **{f"{name} {what}": (MODEL, content(file, change), file, word)
       for name, file in (("UNet", UNET), ("text encoder", TEXT), ("autoencoder", VAE))
       for what, change, word in (("is an LFS pointer", LFS, "git lfs pull"), ("is cut", CUT, "damaged"),
                                  ("is empty", b"", "empty"))},
    "header of a UNet is nonsense": (MODEL, content(UNET, b"\xff" * 100), UNET, "damaged"),
    "UNet is a pickle": (
        MODEL, moved(UNET, "unet/diffusion_pytorch_model.bin"), "diffusion_pytorch_model.bin", "weights_only=True"),
    "text encoder is a pickle": (
        MODEL, moved(TEXT, "text_encoder/pytorch_model.bin"), "pytorch_model.bin", "weights_only=True"),
    "UNet has no weights": (MODEL, gone(UNET), "unet"),
    "UNet has two variants alone": (
        MODEL, both(moved(UNET, "unet/diffusion_pytorch_model.a.safetensors"),
                    content("unet/diffusion_pytorch_model.b.safetensors", b"")), "a or b"),
    "a shard is missing": (
        MODEL, both(moved(UNET, "unet/diffusion_pytorch_model-00001-of-00002.safetensors"),
                    content("unet/diffusion_pytorch_model.safetensors.index.json", json.dumps({"weight_map": {
                        "conv_in.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}}).encode())),
        "00002-of-00002"),
    # Models: configurations
    "model_index.json is cut": (MODEL, content("model_index.json", CUT), "model_index.json", "JSON"),
    "model_index.json is a list": (MODEL, content("model_index.json", b"[]"), "model_index.json"),
    "model_index.json is an LFS pointer": (MODEL, content("model_index.json", LFS), "model_index.json", "git lfs pull"),
    "model_index.json names no class": (MODEL, settings("model_index.json", _class_name=["a"]), "['a']"),
    "no SDXL": (WHOLE, settings("model_index.json", _class_name="StableDiffusionXLPipeline"),
                "StableDiffusionXLPipeline"),
    "a refiner": (WHOLE, settings("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
                  "StableDiffusionXLImg2ImgPipeline"),
    "an LCM": (MODEL, settings("model_index.json", _class_name="LatentConsistencyModelPipeline"),
               "LatentConsistencyModelPipeline"),
    "inpainting": (WHOLE, settings("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
                   "StableDiffusionInpaintPipeline"),
    "inpainting under another name": (
        WHOLE, both(tensors(UNET, value("conv_in.weight", lambda one: torch.zeros(8, 9, 3, 3))),
                    settings("unet/config.json", in_channels=9)), "9"),
    "config of another class": (
        LAYOUT, settings("unet/config.json", _class_name="UNet2DModel"), "unet/config.json", "UNet2DModel"),
    "config is cut": (LAYOUT, content("text_encoder/config.json", CUT), "text_encoder/config.json", "JSON"),
    "config is nonsense": (LAYOUT, settings("unet/config.json", block_out_channels="many"), "unet/config.json"),
    "no config": (WHOLE, gone("vae/config.json"), "vae/config.json"),
    "config says quantised": (
        LAYOUT, settings("unet/config.json", quantization_config={"load_in_4bit": True}), "config.json", "quantised"),
    "no scheduler config": (MODEL, gone("scheduler/scheduler_config.json"), "scheduler_config.json"),
    "scheduler config is empty": (MODEL, content("scheduler/scheduler_config.json", b""), "scheduler_config.json"),
    "unknown scheduler": (
        WHOLE, settings("model_index.json", scheduler=["diffusers", "NoScheduler"]), "NoScheduler"),
    "scheduler that diffusers refuses": (
        WHOLE, settings("scheduler/scheduler_config.json", beta_schedule="none"), "scheduler"),
    "a schedule without a step": (
        WHOLE, settings("scheduler/scheduler_config.json", num_train_timesteps=0), "scheduler_config.json"),
    "a prediction of nothing": (
        WHOLE, settings("scheduler/scheduler_config.json", prediction_type="x"), "predict"),
    **{f"a scaling factor of {what}": (WHOLE, settings("vae/config.json", scaling_factor=what), "scaling_factor")
       for what in (None, "x", 0)},
    "a component is not there": (MODEL, lambda model: shutil.rmtree(model / "vae"), "vae"),
    # Tokenizers
    "tokenizer without words": (
        "pipeline tokenizer", lambda model: [path.unlink() for path in (model / "tokenizer").iterdir()] and None,
        "tokenizer", "vocab.json"),
    "tokenizer's config is cut": (
        "pipeline tokenizer", content("tokenizer/tokenizer_config.json", CUT), "tokenizer_config.json", "JSON"),
    "tokenizer without a longest text": (
        "pipeline tokenizer", settings("tokenizer/tokenizer_config.json", model_max_length=None), "model_max_length"),
    "tokenizer of longer texts": (
        "pipeline", settings("tokenizer/tokenizer_config.json", model_max_length=100), "100", "text_encoder"),
    "tokenizer of more words": (
        "pipeline", both(settings("text_encoder/config.json", vocab_size=9), tensors(TEXT, value(
            "text_model.embeddings.token_embedding.weight", lambda one: one[:9]))), "text_encoder", "9"),
    "tokenizer of no text": (
        "pipeline tokenizer", settings("tokenizer/tokenizer_config.json", model_max_length=-1), "model_max_length"),
    "a tokenizer that is none": (
        "pipeline tokenizer", settings("model_index.json", tokenizer=["transformers", "CLIPModel"]), "CLIPModel"),
    # What is no model
    "no such model": (f"{LAYOUT} tokenizer captioner", lambda model: model / "nowhere", "nowhere"),
    "an empty folder as a model": (MODEL, lambda model: (model / "new").mkdir() or model / "new", "is empty"),
    "a pickle as a model": (
        MODEL, lambda model: content("m.ckpt", b"\x80")(model) or model / "m.ckpt", "m.ckpt", "weights_only=True"),
    "a text file as a model": (
        MODEL, lambda model: content("m.txt", b"a")(model) or model / "m.txt", "m.txt"),
    "a LoRA as a model": (MODEL, lambda model: model.parent / "lora" / DIFFUSERS_NAME, DIFFUSERS_NAME, "LoRA"),
    "a dataset as a model": (MODEL, lambda model: model.parent / "data", "data"),
    # LoRAs
    "a cut LoRA": ("lora", content(DIFFUSERS_NAME, CUT), DIFFUSERS_NAME, "damaged"),
    "an empty LoRA": ("lora", content(DIFFUSERS_NAME, b""), DIFFUSERS_NAME, "empty"),
    "an LFS pointer as a LoRA": ("lora", content(DIFFUSERS_NAME, LFS), DIFFUSERS_NAME, "git lfs pull"),
    "a LoRA of NaN": ("lora", tensors(DIFFUSERS_NAME, value(f"{TO_Q}.lora_A.weight", NAN)), DIFFUSERS_NAME, "NaN"),
    "a LoRA of rank 0": (
        "lora", tensors(DIFFUSERS_NAME, lambda t: t.update({
            f"{TO_Q}.lora_A.weight": torch.zeros(0, 8), f"{TO_Q}.lora_B.weight": torch.zeros(8, 0)})), DIFFUSERS_NAME),
    "a LoRA of single numbers": (
        "lora", tensors(DIFFUSERS_NAME, value(f"{TO_Q}.lora_A.weight", lambda one: torch.ones(()))), DIFFUSERS_NAME),
    **{f"a LoRA of alpha {what}": ("lora", tensors(DIFFUSERS_NAME, lambda t, own=own: t.update(own), **metadata),
                                   DIFFUSERS_NAME, word)
       for what, own, metadata, word in (
        ("0", {f"{TO_Q}.alpha": torch.tensor(0.0)}, {}, "alpha"),
        ("of two numbers", {f"{TO_Q}.alpha": torch.ones(2)}, {}, "alpha"),
        ("NaN", {}, {METADATA_KEY: '{"unet.lora_alpha": NaN}'}, "alpha"),
        ("for nonsense", {}, {METADATA_KEY: '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"[": 2}}'}, "_pattern"))},
    "half a LoRA layer": ("lora", tensors(DIFFUSERS_NAME, lambda t: t.pop(f"{TO_Q}.lora_A.weight")), DIFFUSERS_NAME),
    "a LoRA of another model": (
        "lora", tensors(DIFFUSERS_NAME, value(f"{TO_Q}.lora_A.weight", lambda one: torch.zeros(2, 320))),
        DIFFUSERS_NAME, "does not fit"),
    "a LoRA of SDXL": ("lora", tensors(DIFFUSERS_NAME, lambda t: t.update({
        "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight": torch.zeros(2, 8)})),
        DIFFUSERS_NAME, "another kind of base"),
    "no such LoRA": ("lora", lambda lora: lora / "nowhere", "nowhere"),
    "a pickle as a LoRA": (
        "lora", lambda lora: content("l.pt", b"\x80")(lora) or lora / "l.pt", "l.pt", "weights_only=True"),
    "a folder without a LoRA": ("lora", lambda lora: lora.parent / "data", "holds no"),
    "a model as a LoRA": ("lora", lambda lora: lora.parent / "model", "model"),
    "a UNet as a LoRA": ("lora", lambda lora: lora.parent / "model" / UNET, UNET),
}  # fmt: skip


# -- datasets: the same is done to both splits -------------------------------------------------------------------------


def image(change):
    """The bytes of the first image of each split, changed."""
    return both(*(content(f"{split}/00000.png", change) for split in ("train", "validation")))


def metadata(change):
    """The bytes of each split's metadata.jsonl, changed."""
    return both(*(content(f"{split}/metadata.jsonl", change) for split in ("train", "validation")))


def rows(**changes):
    """All rows of the metadata, with other values."""
    change = lambda line: json.dumps({k: v for k, v in (json.loads(line) | changes).items() if v is not ...})
    return metadata(lambda before: "\n".join(change(line) for line in before.decode().splitlines()).encode())


def zipped(data):
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        archive.write(data / "train/00000.png")
    return data / "images.zip"


def linked_nowhere(data):
    for split in ("train", "validation"):
        (data / split / "00000.png").unlink()
        (data / split / "00000.png").symlink_to("nowhere.png")


def emptied(data):
    for split in ("train", "validation"):
        shutil.rmtree(data / split)


def metadata_as_folders(data):
    for split in ("train", "validation"):
        (data / split / "metadata.jsonl").unlink()
        (data / split / "metadata.jsonl").mkdir()


def only_a_zip(data):
    zipped(data)
    emptied(data)


BROKEN |= {
    "images are LFS pointers": ("data", image(LFS), "00000.png", "git lfs pull"),
    "an image is cut": ("data", image(CUT), "00000.png"),
    "an image is empty": ("data", image(b""), "00000.png"),
    "an image is a web page": ("data", image(b"<html>404</html>"), "00000.png"),
    "an image is gone": (ROWS, both(gone("train/00000.png"), gone("validation/00000.png")), "00000.png"),
    "a link leads nowhere": (ROWS, linked_nowhere, "00000.png"),
    "a zip as a folder": (DATA, zipped, "images.zip", "unpack"),
    "a folder of a zip": (DATA, only_a_zip, "data"),
    "an image as a folder": (DATA, is_file("train/00000.png"), "00000.png"),
    "a tar as a folder": (
        DATA, lambda data: content("s.tar", b"")(data) or data / "s.tar", "s.tar", "--streaming", "webdataset"),
    "a pattern of tars": (DATA, is_file("{0..1}.tar"), "{0..1}.tar", "webdataset"),
    "no such folder": (DATA, is_file("nowhere"), "nowhere"),
    "an empty folder": (DATA, emptied, "data"),
    "no caption column": (ROWS, rows(text=..., words="a"), "text"),
    "no file names": (ROWS, rows(file_name=...), "file_name"),
    "captions are numbers": (DATA, rows(text=7), "text"),
    "captions are objects": (DATA, rows(text={"en": "a"}), "text"),
    "captions are empty": (ROWS, rows(text=" "), "caption"),
    "metadata is cut": (DATA, metadata(lambda before: before[:-9]), "metadata.jsonl"),
    "metadata is an LFS pointer": (DATA, metadata(LFS), "metadata.jsonl", "git lfs pull"),
    "metadata is UTF-16": (DATA, metadata(lambda before: before.decode().encode("utf-16")), "metadata.jsonl", "UTF-8"),
    "metadata is binary": (DATA, metadata(bytes(range(256))), "metadata.jsonl"),
    "metadata is one list": (DATA, metadata(lambda before: b"[" + b",".join(before.splitlines()) + b"]"), "metadata"),
    "metadata is empty": (ROWS, metadata(b""), "metadata"),
    "metadata is a folder": (ROWS, metadata_as_folders, "metadata.jsonl"),
    "two training splits": (DATA, lambda data: shutil.copytree(data / "train", data / "Training") and None, "Training"),
}  # fmt: skip


# -- captioners --------------------------------------------------------------------------------------------------------

CAPTIONER = "model.safetensors"
BROKEN |= {
    "no such captioner": ("captioner", lambda captioner: captioner / "nowhere", "nowhere: there is no such folder"),
    "a cut captioner": ("captioner", content(CAPTIONER, CUT), CAPTIONER, "damaged"),
    "an empty captioner": ("captioner", content(CAPTIONER, b""), CAPTIONER, "empty"),
    "an LFS pointer as a captioner": ("captioner", content(CAPTIONER, LFS), CAPTIONER, "git lfs pull"),
    "a captioner of NaN": ("captioner", tensors(CAPTIONER, value("output.bias", NAN)), "captioner", "NaN"),
    "half a captioner": ("captioner", tensors(CAPTIONER, lambda t: t.pop("output.bias")), "output.bias"),
    "a captioner's pickle": ("captioner", moved(CAPTIONER, "pytorch_model.bin"), "model.bin", "weights_only=True"),
    "another kind of captioner": ("captioner", settings("config.json", model_type="blip"), "blip"),
    "a captioner's config is cut": ("captioner", content("config.json", CUT), "config.json"),
    "a captioner without words": ("captioner", gone("tokenizer.json"), "captioner"),
    "a pipeline as a captioner": ("captioner", lambda captioner: captioner.parent / "model", "model"),
}  # fmt: skip


# -- outputs -----------------------------------------------------------------------------------------------------------

# {name: (what makes it of {kind: path}, words of the message)}
OUTPUTS = {
    "below a file": (lambda inputs: inputs["model"] / "model_index.json/out", "model_index.json"),
    "a file": (lambda inputs: inputs["model"] / "model_index.json", "model_index.json"),
    "where nothing can be made": (lambda inputs: Path("/proc/out"), "/proc"),
    **{f"{place} the {kind}": (lambda inputs, kind=kind, below=below: inputs[kind] / below, kind)
       for kind in ("model", "data", "lora") for place, below in (("equal to", "."), ("inside", "new/out"))},
}  # fmt: skip


# -- the cells ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sound(tiny_model, tiny_git, tmp_path_factory):
    """A folder of sound inputs: model, lora, data, captioner. Never write to it."""
    root = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny_model, root / "model", ignore=shutil.ignore_patterns("*.non_ema.*"))
    linked(root / "model", root / "tuned")
    tensors(UNET, lambda found: found.update({key: 1.1 * one for key, one in found.items()}))(root / "tuned")
    shutil.copytree(tiny_git, root / "captioner")
    (root / "lora").mkdir()
    facts = {"base_model": "tiny"}
    write_diffusers(root / "lora" / DIFFUSERS_NAME, {TO_Q: Layer(torch.ones(2, 8), torch.ones(8, 2), 2.0)}, facts)
    for split in ("train", "validation"):
        write_shapes(root / "data" / split, 3, ["filled"], ("circle", "square"), 0.5, split == "validation", seed=0)
    return root


def kinds(command):
    return set(re.findall(r"{(?!other_)(\w+)}", COMMANDS[command]))


# Where the kinds lie in the folder of inputs; the others under their own name
PLACES = {
    "pipeline": "model", "weights": "model", "layout": "model", "tokenizer": "model", "images": "data", "rows": "data",
}  # fmt: skip


def listing(*folders):
    """{path: what changes when it is written to} of all that lies below."""
    entries = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {path: path.lstat().st_mtime_ns for path in entries}


def run(command, **paths):
    """The exit status of a command of COMMANDS."""
    script, *words = COMMANDS[command].split()
    try:
        return importlib.import_module(script).main([word.format(**paths) for word in words])
    except SystemExit as end:
        return end.code


def paths_of(sound, output, **changes):
    names = {*PLACES, "lora", "data", "captioner"}
    own = {name: sound / PLACES.get(name, name) for name in names}
    others = {f"other_{name}": path for name, path in own.items()} | {"other_weights": sound / "tuned"}
    return own | others | {"output": output} | changes


def linked(source, target):
    """A copy whose files are links to those of the source: what is changed has to be unlinked before."""
    return shutil.copytree(source, target, symlinks=True, copy_function=os.link)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_sound_inputs(command, sound, tmp_path):
    shutil.copytree(sound, tmp_path / "inputs")  # captions are written into their folder
    assert run(command, **paths_of(tmp_path / "inputs", tmp_path / "out")) == 0


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_input_is_one_message_in_every_command_that_meets_it(name, sound, tmp_path, capfd):
    affected, damage, *words = BROKEN[name]
    inputs = linked(sound, tmp_path / "inputs")
    places = {PLACES.get(kind, kind) for kind in affected.split()}
    broken = {place: damage(inputs / place) or inputs / place for place in places}
    for command in (command for command in COMMANDS if kinds(command) & {*affected.split()}):
        changes = {kind: broken[PLACES.get(kind, kind)] for kind in kinds(command) & {*affected.split()}}
        assert_refused(command, words, paths_of(sound, tmp_path / command, **changes), (sound, inputs), capfd)
        if command in ("generate", "evaluate", "sweep") and "NaN" not in name:  # only reading all weights shows that
            assert not list((tmp_path / command).rglob("*.png")), f"{command} generates images before it looks"


def may_meet(name, command):
    """Whether a command has an output, and reads what the output lies in."""
    read = {PLACES.get(kind, kind) for kind in kinds(command)}
    place = name.split()[-1]
    return "output" in read and (place in read or place not in ("model", "data", "lora"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_is_one_message(name, sound, tmp_path, capfd):
    place, *words = OUTPUTS[name]
    inputs = linked(sound, tmp_path / "inputs")
    output = place({one.name: one for one in inputs.iterdir()})
    for command in (command for command in COMMANDS if may_meet(name, command)):
        assert_refused(command, words, paths_of(inputs, output), (sound, inputs), capfd)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "output" in kinds(command)])
def test_a_full_disk_is_one_message(command, sound, tmp_path, capsys):
    """No file may grow beyond a few bytes: the error is another than that of a full disk, in the same places."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        status = run(command, **paths_of(sound, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert status == 1 and "Traceback" not in message
    assert str(tmp_path / "out") in message and re.search("too large|cannot be written|disk", message), message


def assert_refused(command, words, paths, inputs, capfd):
    """The command ends with a message that says the words, and the folders of inputs stay as they were."""
    before = listing(*inputs)
    try:
        status = run(command, **paths)
    except Exception as error:
        raise AssertionError(f"{command} ends in a traceback") from error
    message = "".join(capfd.readouterr())
    lacking = [word for word in words if word not in message]
    assert (status in (1, 2), lacking) == (True, []), f"{command}: {message}"
    assert "Traceback" not in message, f"{command}: {message}"
    assert listing(*inputs) == before, command
