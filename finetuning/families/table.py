"""The table of families: a line here and one file are all that a new one needs."""

from finetuning.families.model_args import ModelError
from finetuning.families.stable_diffusion import StableDiffusion

FAMILIES = {family.pipeline: family for family in (StableDiffusion(),)}


def family_of(class_name, what="this pipeline"):
    """The Family of a pipeline's class, as its model_index.json names it. Raises ModelError, which says `what`."""
    if class_name not in FAMILIES:
        raise ModelError(f"{what} is a {class_name}; what can be used is {', '.join(FAMILIES)}")
    return FAMILIES[class_name]
