"""Images from a diffusers pipeline, in batches: the one place where this project samples."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from finetuning.cli import first_few, flag, flags_of, report
from finetuning.families.model_args import ModelError
from finetuning.families.quiet import errors_only
from finetuning.families.table import family_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NEEDS = ("upscaler", "chain")  # flags that name one


@dataclass
class UpscalerArgs:
    """Upscaling"""

    upscaler_steps: int = flag(50, "sampling steps of the upscaler", min=1, requires=NEEDS)
    upscaler_guidance_scale: float = flag(1.0, "guidance scale of the upscaler; 1 is none", requires=NEEDS)
    upscaler_noise_level: int = flag(
        50, "timestep up to which the small image is noised: a higher one lets the upscaler invent more", min=0,
        max=999, requires=NEEDS,
    )  # fmt: skip
    upsample_temperature: float = flag(
        1.0, "the upscaler starts from noise this times as strong; GLIDE takes 0.997", above=0, requires=NEEDS
    )
    back_projections: int = flag(
        0, "times that an enlarged image is corrected by what its own small image differs in from the given one "
        "(Irani and Peleg 1991): keeps colours that the upscaler drifts from", min=0, requires=NEEDS,
    )  # fmt: skip


def upscaling_facts(args, upscaler):
    """What the facts of an image say of its upscaler, which is named; nothing without one."""
    return {"upscaler": upscaler} | {name: getattr(args, name) for name in flags_of(UpscalerArgs)} if upscaler else {}


def upscale(pipeline, images, prompts, generators, args: UpscalerArgs, batch_size):
    """Yield the PIL images of an upscaler's pipeline, whose longer side is the one that it was made for.

    images, prompts, generators  lists as long as each other; the images of one size
    """
    width, height = images[0].size
    family = family_of(pipeline)
    factor = family.side(family.components_of(pipeline)) / max(width, height)
    pipeline.scheduler.init_noise_sigma = args.upsample_temperature
    made = generate(
        pipeline, prompts, generators, images=images, batch_size=batch_size,
        size=(round(height * factor), round(width * factor)), num_inference_steps=args.upscaler_steps,
        guidance_scale=args.upscaler_guidance_scale, noise_level=args.upscaler_noise_level,
    )  # fmt: skip
    for large, small in zip(made, images, strict=True):
        yield back_projected(large, small, args.back_projections)


def back_projected(image, small, times):
    """A PIL image whose bicubic reduction is nearer to `small`."""
    if not times:
        return image
    scaled = lambda values, size: np.stack(
        [
            np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
            for plane in np.moveaxis(values, 2, 0)
        ],
        2,
    )
    wanted, values = np.asarray(small, np.float32), np.asarray(image, np.float32)
    for _ in range(times):
        values = values + scaled(wanted - scaled(values, small.size), image.size)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def generate(pipeline, prompts: Sequence[str], generators, *, batch_size, size=None, images=None, **options):
    """Yield a PIL image for each prompt, in order.

    generators  a torch.Generator for each prompt: the same one gives the same starting noise whatever the batch size
    size        (height, width) in pixels; none: the pipeline's own
    images      what an upscaler enlarges, a PIL image for each prompt
    options     the pipeline's: num_inference_steps, guidance_scale, ...; a negative_prompt is one text for all

    Raises ModelError where an image has a value that is not a finite number, which would be shown as black.
    """
    family, generators = family_of(pipeline), list(generators)
    if family.needs_image and images is None:
        raise ModelError(f"a {family.pipeline} enlarges images and makes none: name it as the --upscaler of a model")
    options |= family.call_options
    sides = dict(zip(("height", "width"), size or (), strict=False))
    negative = options.pop("negative_prompt", None)
    _tell_of_cut_prompts(pipeline.tokenizer, family.text_length, prompts)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        if images is not None:
            options["image"] = images[start : start + batch_size]
        if negative:
            options["negative_prompt"] = [negative] * len(batch)
        with errors_only():  # of what is cut, which stands above
            values = pipeline(
                batch, generator=generators[start : start + len(batch)], output_type="np", **sides, **options
            ).images  # [n, height, width, 3]
        broken = [prompt for prompt, one in zip(batch, values, strict=True) if not np.isfinite(one).all()]
        if broken:
            dtype = str(pipeline.dtype).removeprefix("torch.")
            fix = (
                "its weights are broken"
                if dtype == "float32"
                else f"use fp32 instead of {dtype} (--dtype fp32; while training --mixed_precision no)"
            )
            raise ModelError(f"the model generates values that are not finite numbers for {broken[0]!r}: {fix}")
        yield from pipeline.numpy_to_pil(values)


def _tell_of_cut_prompts(tokenizer, length, prompts):
    """Say which prompts are longer than the text encoder reads: the libraries repeat it in each batch."""
    length = length or tokenizer.model_max_length
    with errors_only():
        cut = [prompt for prompt in dict.fromkeys(prompts) if len(tokenizer(prompt).input_ids) > length]
    if cut:
        report(f"prompts of which only the first {length} tokens are read ({len(cut)}): {first_few(cut, 2)}")


def inference_dtype(name, device):
    """(name, torch dtype) of --dtype fp16, bf16 or fp32; None is fp16 on a GPU and fp32 without."""
    name = name or ("fp32" if device.type == "cpu" else "fp16")
    return name, DTYPES[name]


def parse_size(text):
    """(height, width) in pixels of "512" or "512x768"; None of None. Raises ValueError."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError("must be one side in pixels or HEIGHTxWIDTH")
    sides = [int(side) for side in text.split("x")]
    if any(side % 8 or not side for side in sides):
        raise ValueError("must be a multiple of 8, and above 0")
    return sides[0], sides[-1]


def size_problems(text):
    """What is wrong with --size."""
    try:
        parse_size(text)
    except ValueError as problem:
        yield f"--size {text} {problem}"
