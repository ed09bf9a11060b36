"""Did it learn, and what did it forget? Models on the same captions and seeds, measured, in one report.

    python evaluate_model.py --dataset datasets/chalk --split validation --model original=models/mini-sd \\
        --model tuned=runs/chalk --checker finetuning.shapes.checker \\
        --general_prompts datasets/left_out_of_chalk.txt --guidance_scale 3 --output_dir runs/report

Reads   a folder of captioned images, of which --split is the truth; --model label=PATH, each a pipeline, Hub name or
        checkpoint-N, the first is the reference; --lora label=PATH, put on that first model; --images label=FOLDER,
        made elsewhere. --general_prompts are what should not be forgotten: 60 are shipped, a file replaces them.
Writes  into --output_dir: report.html (one file, for people), report.json, report.csv, report.md, and the images.
        Every value has its n and a 95 % interval; the reference with a second seed shows what is noise.
Resume  after an interruption: the same command again generates only what is missing.
FID, KID, LPIPS and CLIP need networks: the libraries' own downloads, or files named by --inception_weights,
--lpips_trunk and --clip_model. What cannot be measured is left out, and the report says why. docs/evaluation.md has a
table of the metrics, and shows how to write a --checker of your own.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from finetuning.cli import REQUIRED, as_dict, flag, paths_read, run_script
from finetuning.data.reading import SPLIT_NAMES
from finetuning.evaluation.candidates import CandidateArgs, curves, generate_all
from finetuning.evaluation.forgetting import ForgettingArgs, forgetting
from finetuning.evaluation.generation import GenerationArgs, dataset_rows, ready_images
from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks, summarise
from finetuning.evaluation.report import write_report
from finetuning.evaluation.words import verdict
from finetuning.families.generation import inference_dtype
from finetuning.files import output_problems

PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity", "lpips")


@dataclass
class Args(ForgettingArgs, EvalNetworkArgs, GenerationArgs, CandidateArgs):
    """What is evaluated"""

    dataset: str = flag(
        REQUIRED, "folder of captioned images: the captions are prompts, the images are the truth", reads=True
    )
    output_dir: str = flag(REQUIRED, "where the report and the images go")
    split: str | None = flag(
        None, "of the dataset (none: test, or all of a folder without splits)", choices=tuple(SPLIT_NAMES)
    )
    caption_column: str = flag("text", "where the captions stand in the metadata")
    max_rows: int | None = flag(None, "captions at most, chosen with --seed", min=2)

    def problems(self):
        inputs = paths_read(self) + [
            path for one in self.candidates for path in (one.path, one.lora, one.upscaler) if path
        ]
        inputs += [one.path for one in self.ready]
        yield from output_problems(self.output_dir, inputs)


def main(argv=None):
    """Generate, measure, write the report, and return the exit status."""
    return run_script(Args, __doc__, evaluate, argv)


def evaluate(args):
    """The whole evaluation."""
    from accelerate import PartialState

    device, folder = PartialState().device, Path(args.output_dir)
    dtype_name, dtype = inference_dtype(args.dtype, device)
    rows = dataset_rows(args.dataset, args.split, args.caption_column, args.max_rows, args.seed)
    general = args.general_rows()

    # Before anything is generated: what was asked for and cannot be had stops the run here
    opened = open_networks(args, device)
    ready = images_made_elsewhere(args, rows)

    # Generate and measure
    made = generate_all(args, rows, general, device, dtype)
    measured = measure(rows, made.dataset | ready, opened, args, device)
    report = summarise(measured, folder) | {"forgetting": None}
    if general or args.retain_dataset:
        losses = made.losses if args.retain_dataset else None
        report["forgetting"] = forgetting(
            general, made.general, opened, args, device, dataset=measured, losses=losses, folder=folder
        )

    # Write
    models = [
        {"label": one.label, "source": one.source, "noise_floor": one.is_noise_floor} for one in args.candidates
    ] + [{"label": one.label, "source": one.path, "noise_floor": False} for one in args.ready]
    report["models"] = sorted(models, key=lambda one: measured.models.index(one["label"]))
    report["curves"] = curves(report["forgetting"], args.candidates)
    report["made"] = {
        "command": ["python", *sys.argv],
        "versions": {one: version(one) for one in PACKAGES},
        "args": as_dict(args) | {"device": str(device), "dtype": dtype_name},
    }
    page = write_report(folder, report)
    print("\n".join(verdict(report)))
    print(f"the whole report: {page}")


def images_made_elsewhere(args, rows):
    """{label: {row number: path}} of --images."""
    every = None
    if args.max_rows is not None:
        every = lambda: dataset_rows(args.dataset, args.split, args.caption_column, say=lambda _: None)
    how = {"by_order": args.by_order, "caption_column": args.caption_column}
    return {one.label: ready_images(one.path, rows, every, **how) for one in args.ready}


if __name__ == "__main__":
    sys.exit(main())
