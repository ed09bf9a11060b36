"""What a model is made of. A family is one file here, and one line in this table."""

from transformers.utils import logging as transformers_logging

from finetuning.families import sd

FAMILIES = {sd.PIPELINE: sd}

transformers_logging.disable_progress_bar()  # "Loading weights" at every part of a model says nothing
