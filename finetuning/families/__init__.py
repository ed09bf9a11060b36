"""What a model is made of. A family is one file here, and one line in this table."""

from finetuning.families import sd

FAMILIES = {sd.PIPELINE: sd}
