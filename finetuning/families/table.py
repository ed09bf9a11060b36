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


def family_of_tensors(names):
    """The Family of a denoiser alone, or of a single file, by the names of its tensors."""
    marked = lambda family: any(name.startswith(family.marks) for name in names)
    return next(filter(marked, FAMILIES.values()), DEFAULT_FAMILY)


def family_of_components(components):
    """The Family of {name: module}."""
    return family_of_tensors([key for module in components.values() for key in module.state_dict()])


def family_of(pipeline):
    """The Family of an opened diffusers pipeline, or of a pipeline's class by name. Raises ModelError."""
    class_name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if class_name not in FAMILIES:
        raise ModelError(f"this pipeline is a {class_name}; what can be used is {', '.join(FAMILIES)}")
    return FAMILIES[class_name]
