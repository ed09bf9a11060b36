"""Interpolate fine-tuned and base weights; fuse, extract and combine LoRAs; find the ratio that serves best.

    python merge_checkpoints.py --base models/mini-sd --tuned runs/chalk --ratio 0.3 0.5 0.7 --output_dir runs/merged
    python merge_checkpoints.py sweep --base models/mini-sd --tuned runs/chalk --ratios 0:1:0.1 \\
        --prompts_in shown.txt --prompts_out unrelated.txt --output_dir runs/sweep
    python merge_checkpoints.py fuse --base models/mini-sd --lora runs/chalk-lora --scale 0.8 --output_dir runs/fused
    python merge_checkpoints.py extract --base A --tuned B --rank 32 --output_dir DIR     a LoRA of the difference
    python merge_checkpoints.py resize | combine | convert ...                            LoRAs: COMMAND --help
    python merge_checkpoints.py ema runs/chalk --sigma_rel 0.05 0.1 --output_dir DIR      other averages of one run
    python merge_checkpoints.py show DIR                                                  how a result was made
    python merge_checkpoints.py replay DIR --output_dir NEW                               make it again

Reads   diffusers pipelines (folders or Hub names), checkpoint-N folders of a run (--weights ema or raw), .safetensors
        files in the original layout (A1111, ComfyUI), bare UNets. Inputs are never changed, and pickles never opened.
Writes  --output_dir: a pipeline that from_pretrained loads, or with --single_file one .safetensors; merge.json with all
        that makes it again. Several ratios give a folder each, ratio-0.3/ and so on, in one pass over the inputs.
        A result is whole or not there; the arithmetic is fp32, rounded once.
docs/merging.md says which command is for what.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import REQUIRED, as_dict, flag, read, run_commands
from finetuning.families.model_args import ModelError
from finetuning.files import write_json
from finetuning.merging.methods import METHODS, bound
from finetuning.merging.model_flags import MixArgs
from finetuning.merging.model_writer import MergeOutput, OutputArgs, output_folder, write_models
from finetuning.merging.ratios import block_ratios
from finetuning.merging.recipe import changed_inputs, described, read_recipe

OLDER_NAMES = {"fold": "fuse"}


@dataclass
class MergeArgs(OutputArgs, MixArgs):
    """Ratios"""

    ratio: list[float] = flag([0.5], "how far to go from base (0) to tuned (1); each ratio gives a model")

    def open_sources(self):
        """Base, tuned models and origin."""
        return self.open_models(self.origin)

    def problems(self):
        if len({f"{ratio:g}" for ratio in self.ratio}) < len(self.ratio):
            yield f"--ratio {' '.join(map(str, self.ratio))} names a ratio twice (6 digits count)"


@dataclass
class ShowArgs:
    """What to show"""

    path: str = flag(REQUIRED, "folder of a result, its merge.json, or a .safetensors file of it", positional=True)


@dataclass
class ReplayArgs:
    """What to make again"""

    path: str = flag(REQUIRED, "folder of a result, its merge.json, or a .safetensors file of it", positional=True)
    output_dir: str = flag(REQUIRED, "where it goes this time")


def merge(args):
    """The mixtures of base and tuned, one for each ratio."""
    sources = args.open_sources()
    matches, warnings = args.match(sources)
    if len({source.files for source in sources}) == 1:
        warnings.append(f"{args.base} is merged with itself: the result is a copy")
    blocks = block_ratios(args.block_ratios, matches)

    def output(ratio):
        compute = lambda one: bound(args, one.name, blocks.get(one.name, ratio))
        target = output_folder(args.output_dir, f"ratio-{ratio:g}", args.ratio)
        return MergeOutput(target, compute, as_dict(args) | {"ratio": [ratio]})

    outputs = [output(ratio) for ratio in args.ratio]
    warnings = [warning for source in sources for warning in source.warnings] + warnings
    whole = METHODS[args.method].whole
    return warnings + write_models("merge", outputs, sources, matches, args, whole=whole, fallback=args.fallback)


def show(args):
    """The recipe of a result."""
    return described(read_recipe(args.path))


def replay(args):
    """The result of a recipe once more: byte for byte, where the inputs and the code are the same."""
    recipe = read_recipe(args.path)
    name = OLDER_NAMES.get(recipe["run"]["command"], recipe["run"]["command"])
    if name not in COMMANDS or name in ("show", "replay", "sweep"):
        raise ModelError(f"{args.path} is of another version: it was made by {name}, which is not known here")
    flags_class, function = COMMANDS[name]()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "merge.json"
        write_json(config, recipe)
        again, problems = read(flags_class, "", ["--config", str(config), "--output_dir", args.output_dir])
    if problems:
        said = "\n".join(problem.removeprefix(f"--config {config}: ") for problem in problems)
        raise ModelError(f"{args.path} cannot be replayed, perhaps it is of another version:\n{said}")
    if changed := list(changed_inputs(recipe, again.open_sources())):
        raise ModelError("\n".join(changed))
    return function(again)


# -- the commands: each imports what it needs only when it is meant --------------------------------------------------


def sweep():
    from finetuning.merging.sweep import SweepArgs, sweep

    return SweepArgs, sweep


def fuse():
    from finetuning.merging.lora_tools import FuseArgs, fuse

    return FuseArgs, fuse


def extract():
    from finetuning.merging.lora_extraction import ExtractArgs, extract

    return ExtractArgs, extract


def resize():
    from finetuning.merging.lora_extraction import ResizeArgs, resize

    return ResizeArgs, resize


def combine():
    from finetuning.merging.lora_combination import CombineArgs, combine

    return CombineArgs, combine


def convert():
    from finetuning.merging.lora_tools import ConvertArgs, convert

    return ConvertArgs, convert


def ema():
    from finetuning.merging.post_hoc_ema import PostHocArgs, average

    return PostHocArgs, average


COMMANDS = {
    "merge": lambda: (MergeArgs, merge), "sweep": sweep, "fuse": fuse, "extract": extract, "resize": resize,
    "combine": combine, "convert": convert, "ema": ema, "show": lambda: (ShowArgs, show),
    "replay": lambda: (ReplayArgs, replay),
}  # fmt: skip


def commands():
    """{name: (flags, function that returns lines to print)} of all, for the page of flags."""
    return {name: load() for name, load in COMMANDS.items()}


def printing(load):
    """An entry for run_commands, whose function prints the lines."""

    def loaded():
        flags_class, function = load()
        return flags_class, lambda args: print("\n".join(function(args)))

    return loaded


def main(argv=None):
    """Do what the first word says (without one: merge), and return the exit status."""
    entries = {name: printing(load) for name, load in COMMANDS.items()}
    return run_commands(entries, __doc__, argv, was=OLDER_NAMES, usual="merge")


if __name__ == "__main__":
    sys.exit(main())
