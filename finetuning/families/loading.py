"""The table of families, and the model that the flags name."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline

from finetuning.families import sd
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs

FAMILIES = {"StableDiffusionPipeline": sd}


def load_model(args: ModelArgs, prediction_type, seed, start: StartArgs | None = None):
    """The model that the flags name, its parts in fp32 on the CPU. Raises ModelError.

    `prediction_type` None keeps the base's; `seed` makes the weights of --from_scratch; without `start` the weights
    are the base's own.
    """
    folder = local_folder(args)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise ModelError(f"{folder} is a {kind}; what can be trained is {', '.join(FAMILIES)}")
    return FAMILIES[kind].load(folder, index, args, prediction_type, seed, start or StartArgs())


def local_folder(args):
    """The folder of the model's files; a Hub name is downloaded into the cache, or found there."""
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ModelError(
                f"--pretrained_model_name_or_path {name} has no model_index.json: it is not a diffusers pipeline. "
                "(A checkpoint folder is resumed with --resume_from_checkpoint)"
            )
        if args.revision:
            raise ModelError(f"--revision {args.revision}: {name} is a folder and has no revisions: leave it out")
        return Path(name)
    try:
        return Path(
            DiffusionPipeline.download(name, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir)
        )
    except (OSError, ValueError) as error:
        where = f"{name} at revision {args.revision}" if args.revision else name
        raise ModelError(
            f"--pretrained_model_name_or_path {where} is neither a folder nor to be had: {error}"
        ) from error
