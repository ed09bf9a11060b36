"""The table of families: a line here and one file are all that a new one needs."""

from finetuning.families.stable_diffusion import StableDiffusion

FAMILIES = {family.pipeline: family for family in (StableDiffusion(),)}
