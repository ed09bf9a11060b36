"""Make a dataset that training reads, from what you have.

    python prepare_dataset.py convert SOURCE PATH --output DIR [flags]

SOURCE  imagefolder     pictures with metadata.jsonl, .csv or .parquet, in any of the shapes that people have
        sidecar         pictures with a .txt or .caption file beside each (kohya)
Reads   PATH, which is never changed.
Writes  DIR/train, DIR/validation and DIR/test, each with its pictures and its metadata.jsonl; conversion.json with the
        settings and counts; failures.jsonl with what could not be taken, and why.
Go on   after an interruption: the same command again.
"""

import sys
from dataclasses import dataclass

from finetuning.cli import REQUIRED, flag, parse_command
from finetuning.conversion import SOURCES
from finetuning.conversion.sidecar import SidecarArgs
from finetuning.conversion.writing import WritingArgs, write_dataset
from finetuning.data.reading import DatasetProblem, Findings


@dataclass
class SourceArgs:
    """Source"""

    source: str = flag(REQUIRED, "what PATH is", choices=tuple(SOURCES), positional=True)
    path: str = flag(REQUIRED, "folder or file of the source", positional=True)
    image_column: str = flag("image", "imagefolder: metadata key of the picture, besides file_name")
    caption_column: str = flag("text", "imagefolder: metadata key of the caption or list of captions")
    allow_outside_paths: bool = flag(False, "imagefolder: let metadata and links reach pictures outside PATH")


@dataclass
class ConvertArgs(WritingArgs, SidecarArgs, SourceArgs):
    """Every flag of convert."""


def main(argv=None):
    """Do what the first word says, and return the exit status."""
    name, args = parse_command({"convert": ConvertArgs}, __doc__, argv)
    try:
        return {"convert": convert}[name](args)
    except DatasetProblem as problem:
        print(f"DatasetProblem: {problem}", file=sys.stderr)
        return 1


def convert(args):
    """From any source to one folder."""
    findings = Findings()
    samples = list(SOURCES[args.source](args.path, args, findings))
    if findings.faults and args.on_bad_rows == "error":
        raise DatasetProblem(
            f"{args.path} has {findings.count()} faults (x):\n{findings.report()}\n"
            "  mend them, or take the rest with --on_bad_rows skip"
        )
    if report := findings.report():
        print(f"{args.path}, left out (x) and noted (-):\n{report}", file=sys.stderr)
    if not samples:
        raise DatasetProblem(f"{args.path} holds nothing that could be taken")
    write_dataset(samples, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
