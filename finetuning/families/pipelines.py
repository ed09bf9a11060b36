"""A pipeline to draw with, from whatever a person has: a folder, a Hub name, or a checkpoint of a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from finetuning.families.lora_files import DIFFUSERS_NAME, RAW_NAME
from finetuning.families.model_args import ModelError

SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
TRAINABLE = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@dataclass(frozen=True)
class ModelSource:
    """A model as it was named: `label=path`, or a path that is its own label."""

    label: str
    path: str

    @classmethod
    def parse(cls, text):
        label, separator, path = text.partition("=")
        if separator and "/" not in label:
            return cls(label, path)
        place = Path(text)
        if place.name in (DIFFUSERS_NAME, RAW_NAME):
            place = place.parent
        name = place.name.removesuffix(".safetensors")
        return cls("/".join(place.parts[-2:]) if name.startswith("checkpoint-") else name, text)


def open_pipeline(
    source, *, weights="ema", variant=None, base=None, vae=None, scheduler=None, device="cpu", dtype=torch.float32
):
    """A diffusers pipeline with its progress bar off. Raises ModelError.

    source     folder of a pipeline, Hub name, or checkpoint-N folder of a run, whose other parts come from `base`
               (none: the model that the run started from)
    weights    "ema" or "raw": which of the two a run has kept; where only one is there, that one
    variant    of the files of a pipeline, e.g. fp16
    vae        folder or Hub name of another autoencoder
    scheduler  a key of SCHEDULERS; none keeps the pipeline's own
    """
    path = Path(source)
    if (path / "lora").is_dir() or (path / DIFFUSERS_NAME).is_file():
        raise ModelError(f"{source} holds a LoRA, not a whole model: name its base with --model, and it with --lora")
    whole, prediction_type = {"variant": variant} if variant else {}, None
    try:
        if (path / "training_state.json").is_file():
            started = json.loads((path / "training_state.json").read_text(encoding="utf-8"))["args"]
            prediction_type = started["prediction_type"]
            whole = {} if base else {name: started[name] for name in ("revision", "variant", "cache_dir")}
            base = base or started["pretrained_model_name_or_path"]
            parts = _checkpoint_parts(path, weights, dtype)
        else:
            parts = _raw_parts(source, dtype) if weights == "raw" else {}
        if vae:
            subfolder = "vae" if (Path(vae) / "vae").is_dir() else None
            parts["vae"] = AutoencoderKL.from_pretrained(vae, subfolder=subfolder, dtype=dtype)
        pipeline = DiffusionPipeline.from_pretrained(
            base or source, safety_checker=None, requires_safety_checker=False, dtype=dtype, **whole, **parts
        )
    except (OSError, ValueError) as error:
        hint = "; name the model that the run started from with --base" if prediction_type is not None or whole else ""
        raise ModelError(f"{source} cannot be opened as a diffusers pipeline: {error}{hint}") from error
    if prediction_type:  # of the run, which may have changed it
        config = {**pipeline.scheduler.config, "prediction_type": prediction_type}
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    if scheduler:
        options = {"skip_prk_steps": True} if scheduler == "pndm" else {}  # PLMS, Stable Diffusion's own kind of PNDM
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _raw_parts(source, dtype):
    """The parts that are there as the variant non_ema, in a folder or on the Hub."""
    parts = {}
    for part, kind in TRAINABLE.items():
        try:
            parts[part] = kind.from_pretrained(source, subfolder=part, variant="non_ema", dtype=dtype)
        except (OSError, ValueError):
            continue  # this part has one set of weights, which the pipeline loads
    return parts


def _checkpoint_parts(folder, weights, dtype):
    """The trained parts of a checkpoint; the rest is the base's."""
    suffix = "_ema" if weights == "ema" and (folder / "unet_ema").is_dir() else ""
    parts = {"unet": UNet2DConditionModel.from_pretrained(folder / f"unet{suffix}", dtype=dtype)}
    if (folder / f"text_encoder{suffix}").is_dir():
        parts["text_encoder"] = CLIPTextModel.from_pretrained(folder / f"text_encoder{suffix}", dtype=dtype)
    return parts
