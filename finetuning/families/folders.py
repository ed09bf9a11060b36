"""Folders of diffusers pipelines: their parts, the names of their weights, and copies of parts that nothing changed."""

import json
import shutil
from pathlib import Path

from finetuning.files import write_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx")


def pipeline_index(folder):
    """The content of model_index.json."""
    return json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))


def parts_of_index(index):
    """The folders that a model_index.json names."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0]]


def weights_name(part, variant=None):
    """The file that holds a part's weights."""
    stem = "model" if part in ("text_encoder", "safety_checker") else "diffusion_pytorch_model"
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def copy_part(source, target, weights=True):
    """Copy a part's files but for pickles. Where only a variant is there (model.fp16.safetensors), it takes the plain
    name. Without `weights` only what stands beside them.
    """
    target.mkdir()
    files = sorted(path for path in source.iterdir() if path.is_file())
    own = [path for path in files if path.suffix == ".safetensors"]
    for path in files:
        if path in own or path.name.endswith(".safetensors.index.json"):
            wanted = weights
        else:
            wanted = not (path.suffix in PICKLES and (own or not weights))
        if wanted:
            shutil.copyfile(path, target / path.name)
    plain = {path.name for path in own if path.name.count(".") == 1}
    if weights and own and not plain:
        stem = own[0].name.split(".")[0]
        (target / own[0].name).rename(target / f"{stem}.safetensors")


def write_scheduler(source, target, prediction_type):
    """The base's scheduler as it is, except that it says what the UNet predicts."""
    target.mkdir()
    config = json.loads((source / "scheduler_config.json").read_text(encoding="utf-8"))
    if config.get("prediction_type", "epsilon") == prediction_type:
        shutil.copyfile(source / "scheduler_config.json", target / "scheduler_config.json")
    else:
        write_json(target / "scheduler_config.json", config | {"prediction_type": prediction_type})
