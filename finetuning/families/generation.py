"""Images from a diffusers pipeline, in batches: the one place where this project samples."""

import re
from collections.abc import Sequence

import numpy as np
import torch

from finetuning.families.model_args import ModelError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def generate(pipeline, prompts: Sequence[str], generators, *, batch_size, size=None, **options):
    """Yield a PIL image for each prompt, in order.

    generators  a torch.Generator for each prompt: the same one gives the same starting noise whatever the batch size
    size        (height, width) in pixels; none: the pipeline's own
    options     the pipeline's: num_inference_steps, guidance_scale, ...; a negative_prompt is one text for all

    Raises ModelError where an image has a value that is not a finite number, which would be shown as black.
    """
    generators = list(generators)
    sides = dict(zip(("height", "width"), size or (), strict=False))
    negative = options.pop("negative_prompt", None)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        if negative:
            options["negative_prompt"] = [negative] * len(batch)
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
        raise ValueError("must be a multiple of 8")
    return sides[0], sides[-1]


def size_problems(text):
    """What is wrong with --size."""
    try:
        parse_size(text)
    except ValueError as problem:
        yield f"--size {text} {problem}"
