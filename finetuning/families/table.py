"""The table of families: a line here and one file are all that a new one needs."""

from finetuning.families.model_args import ModelError
from finetuning.families.stable_diffusion import StableDiffusion

FAMILIES = {family.pipeline: family for family in (StableDiffusion(),)}


def family_of(class_name):
    """The Family of a pipeline's class. Raises ModelError."""
    if class_name not in FAMILIES:
        raise ModelError(f"this pipeline is a {class_name}; what can be used is {', '.join(FAMILIES)}")
    return FAMILIES[class_name]
