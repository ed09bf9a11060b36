"""Images from a diffusers pipeline, in batches: the one place where this project samples."""

from collections.abc import Sequence


def generate(pipeline, prompts: Sequence[str], generators, *, batch_size, size=None, **options):
    """Yield a PIL image for each prompt, in order.

    generators  a torch.Generator for each prompt: the same one gives the same starting noise whatever the batch size
    size        (height, width) in pixels; none: the pipeline's own
    options     the pipeline's: num_inference_steps, guidance_scale, ...; a negative_prompt is one text for all
    """
    generators = list(generators)
    sides = dict(zip(("height", "width"), size or (), strict=False))
    negative = options.pop("negative_prompt", None)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        if negative:
            options["negative_prompt"] = [negative] * len(batch)
        yield from pipeline(batch, generator=generators[start : start + len(batch)], **sides, **options).images
