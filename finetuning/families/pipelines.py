"""A pipeline to generate with, from whatever a person has: see opening.open_source."""

from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.families.folders import STATE
from finetuning.families.lora_files import DIFFUSERS_NAME, RAW_NAME, read_lora
from finetuning.families.model_args import ModelError
from finetuning.families.opening import Source, cannot_sample, open_source
from finetuning.families.quiet import errors_only
from finetuning.families.table import FAMILIES

SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


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
    name, *, weights="ema", variant=None, base=None, vae=None, scheduler=None, device="cpu", dtype=torch.float32
):
    """A diffusers pipeline with its progress bar off. Raises ModelError.

    name       whatever open_source takes; what it lacks comes from `base`
    weights    "ema" or "raw": which of the two a run has kept; where only one is there, that one
    variant    of the files of a pipeline, e.g. fp16
    vae        folder or Hub name of another autoencoder
    scheduler  a key of SCHEDULERS; none keeps the pipeline's own
    """
    take = lambda source, component: source.open(component, dtype)
    family, parts = _parts(name, take, weights, variant, base, vae, scheduler)
    with errors_only():
        return family.assemble(*parts).to(device)


def check_models(names, loras=(), upscalers=(), *, weights="ema", base=None, vae=None):
    """Refuse, before any image is generated, what open_pipeline and read_lora would refuse; no weights are read.

    loras      what read_lora takes, each for all of `names`
    upscalers  names likewise, or None

    Raises ModelError, also where an upscaler stands among `names`, or among `upscalers` what enlarges nothing.
    """
    named = [*((name, False) for name in names), *((name, True) for name in upscalers if name)]
    for name, enlarges in dict.fromkeys(named):
        family, (modules, *_) = _parts(name, Source.check, weights, base=base, vae=None if enlarges else vae)
        if family.needs_image != enlarges:
            what = "enlarges images and makes none: name it as the --upscaler of a model"
            raise ModelError(f"{name}: a {family.pipeline} {what if family.needs_image else 'is no upscaler'}")
        for lora in () if enlarges else loras:
            read_lora(lora, {component.name: modules[component.name] for component in family.adaptable}, weights)


def _parts(name, take, weights, variant=None, base=None, vae=None, scheduler=None):
    """(family, [components, tokenizers, schedulers, settings]) of a pipeline; take(source, name) gives a component."""
    if (Path(name) / STATE).is_file():
        variant = None  # the flag is about the other models of the command: a checkpoint has no variants
    wanted = set().union(*(family.folders for family in FAMILIES.values()))
    source = open_source(name, weights=weights, variant=variant, base=base, only=wanted).with_vae(vae)
    family = source.family
    components = {component: take(source, component) for component in family.by_name}
    if problems := list(family.problems(components)):
        raise ModelError(f"{name}: " + "; ".join(problems))
    with errors_only():
        others = {one: source.scheduler(one) for one in family.schedulers if one != "scheduler"}
        schedulers = {"scheduler": sampler(source, scheduler), **others}
    return family, [components, source.tokenizers(), schedulers, source.settings()]


def sampler(source, name=None):
    """The scheduler of a Source's pipeline, or a key of SCHEDULERS in its place. Raises ModelError where it cannot
    sample from such a model."""
    import diffusers

    made = source.scheduler()
    if name:
        options = {"skip_prk_steps": True} if name == "pndm" else {}  # PLMS, Stable Diffusion's kind of PNDM
        with errors_only():
            made = getattr(diffusers, SCHEDULERS[name]).from_config(made.config, **options)
    config, kind = source.scheduler_config, type(made).__name__
    why, no_signal = cannot_sample(kind, config), not made.alphas_cumprod[-1]
    if no_signal and config["prediction_type"] == "epsilon":
        why = "divides by zero where rescale_betas_zero_snr leaves no signal, as it predicts epsilon"
    if why:
        raise ModelError(f"{source.given} cannot be sampled with the {kind}, which {why}: take another --scheduler")
    source.family.check_scheduler(made)
    return made
