"""Interpolate fine-tuned and base weights; fold, extract and combine LoRAs; find the ratio that serves best.

    python merge_checkpoints.py --base models/mini-sd --tuned runs/chalk --ratio 0.3 0.5 0.7 --output_dir runs/merged
    python merge_checkpoints.py sweep --base models/mini-sd --tuned runs/chalk --ratios 0:1:0.1 \\
        --prompts_in shown.txt --prompts_out unrelated.txt --output_dir runs/sweep
    python merge_checkpoints.py fold --base models/mini-sd --lora runs/chalk-lora --scale 0.8 --output_dir runs/folded
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
"""

import sys
from dataclasses import dataclass, fields

import torch

from finetuning.cli import REQUIRED, as_dict, flag, parse_command
from finetuning.families.model_args import ModelError
from finetuning.merging.methods import METHODS, MethodArgs, bound, ratio_problems
from finetuning.merging.models import TunedArgs
from finetuning.merging.ratios import BlockRatios, block_ratios
from finetuning.merging.recipe import changed_inputs, read_recipe, told
from finetuning.merging.writing import OutputArgs, Product, place, write_models


@dataclass
class MergeArgs(OutputArgs, MethodArgs, TunedArgs):
    """Ratios"""

    ratio: list[float] = flag([0.5], "how far to go from base (0) to tuned (1); each ratio gives a model")
    block_ratios: list[str] | None = flag(
        None, "ratios of single blocks: 25 numbers (IN00..IN11 M00 OUT00..OUT11), or 'unet.mid_block.*=0.2' ..."
    )

    def open_sources(self):
        """Base, tuned models and origin."""
        return self.open_models(self.origin)

    def problems(self):
        if len({f"{ratio:g}" for ratio in self.ratio}) < len(self.ratio):
            yield f"--ratio {' '.join(map(str, self.ratio))} names a ratio twice (6 digits count)"
        yield from ratio_problems("--ratio", self.ratio, self.method, self.curve)
        try:
            yield from ratio_problems("--block_ratios", BlockRatios(self.block_ratios).values, self.method, self.curve)
        except ValueError as problem:
            yield f"--block_ratios {problem}"


@dataclass
class ShowArgs:
    """What to show"""

    path: str = flag(REQUIRED, "folder of a result, its merge.json, or a .safetensors file of it", positional=True)


@dataclass
class ReplayArgs:
    """What to make again"""

    path: str = flag(REQUIRED, "folder of a result, its merge.json, or a .safetensors file of it", positional=True)
    output_dir: str = flag(REQUIRED, "where it goes this time")


def main(argv=None):
    """Do what the first word says (without one: merge), and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["merge", *argv]
    known = commands(argv[0] if argv else "")
    name, args = parse_command({name: flags for name, (flags, _) in known.items()}, __doc__, argv)
    try:
        print("\n".join(known[name][1](args)))
    except ModelError as problem:
        print(f"ModelError: {problem}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}: the inputs are as they were", file=sys.stderr)
        return 1
    return 0


def commands(meant=""):
    """{name: (flags, function)}. diffusers and PEFT, many seconds of imports, come only where they are meant."""
    found = {"merge": (MergeArgs, merge), "show": (ShowArgs, show), "replay": (ReplayArgs, replay)}
    if meant in ("merge", "show"):
        return found
    from finetuning.merging import averaging, lora, lora_combination, lora_extraction, sweep

    return found | {
        "sweep": (sweep.SweepArgs, lambda args: sweep.sweep(args, *at_hand())),
        "fold": (lora.FoldArgs, lora.fold),
        "extract": (lora_extraction.ExtractArgs, lora_extraction.extract),
        "resize": (lora_extraction.ResizeArgs, lora_extraction.resize),
        "combine": (lora_combination.CombineArgs, lora_combination.combine),
        "convert": (lora.ConvertArgs, lora.convert),
        "ema": (averaging.AveragingArgs, averaging.average),
    }


def at_hand():
    """The device to draw with, and its precision."""
    from accelerate import PartialState

    device = PartialState().device
    return device, torch.float32 if device.type == "cpu" else torch.float16


def merge(args):
    """The mixtures of base and tuned, one for each ratio."""
    sources = args.open_sources()
    matches, notes = args.match(sources)
    blocks = block_ratios(args.block_ratios, matches)

    def made(ratio):
        compute = lambda one: bound(args, one.name, blocks.of(one.part, one.key, ratio))
        target = place(args.output_dir, f"ratio-{ratio:g}", args.ratio)
        return Product(target, compute, as_dict(args) | {"ratio": [ratio]})

    products = [made(ratio) for ratio in args.ratio]
    notes = [note for source in sources for note in source.notes] + notes
    return notes + write_models("merge", products, sources, matches, args, METHODS[args.method].whole, args.fallback)


def show(args):
    """The recipe of a result."""
    return told(read_recipe(args.path))


def replay(args):
    """The result of a recipe once more: byte for byte, where the inputs and the code are the same."""
    recipe = read_recipe(args.path)
    known, meant = commands(), recipe["run"]["command"]
    if meant not in known:
        raise ModelError(f"{args.path} is of another version: it was made by {meant}, which is not known here")
    flags_class, command = known[meant]
    flags = {name: value for name, value in recipe.items() if name != "run"}
    if strange := flags.keys() - {field.name for field in fields(flags_class)}:
        raise ModelError(
            f"{args.path} is of another version: it has flags that are not known here, {', '.join(strange)}"
        )
    again = flags_class(**flags | {"output_dir": args.output_dir})
    if changed := list(changed_inputs(recipe, again.open_sources())):
        raise ModelError("\n".join(changed))
    return command(again)


if __name__ == "__main__":
    sys.exit(main())
