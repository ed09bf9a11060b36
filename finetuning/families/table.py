"""The table of families: a line here and one file are all that a new one needs."""

from finetuning.families.deepfloyd_if import DeepFloydIF, DeepFloydIFSuperResolution
from finetuning.families.model_args import ModelError
from finetuning.families.stable_diffusion import StableDiffusion
from finetuning.families.stable_diffusion_xl import StableDiffusionXL

FAMILIES = {
    family.pipeline: family
    for family in (StableDiffusion(), StableDiffusionXL(), DeepFloydIF(), DeepFloydIFSuperResolution())
}
DEFAULT_FAMILY = next(iter(FAMILIES.values()))  # of what does not say what it belongs to


def family_of(pipeline):
    """The Family of an opened diffusers pipeline, or of a pipeline's class by name. Raises ModelError."""
    class_name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if class_name not in FAMILIES:
        raise ModelError(f"this pipeline is a {class_name}; what can be used is {', '.join(FAMILIES)}")
    return FAMILIES[class_name]
