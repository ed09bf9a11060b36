"""Make a dataset that training reads, from what you have; check it, and change it.

    python prepare_dataset.py convert SOURCE PATH --output DIR      anything -> train/, validation/, test/
    python prepare_dataset.py check DIR --html report.html          would training take it, and is it any good?
    python prepare_dataset.py augment DIR --output NEW              mirrored, brighter, turned ... copies in train/
    python prepare_dataset.py captions DIR --output NEW --prefix "interior design,"

SOURCE  imagefolder     images with metadata.jsonl, .csv or .parquet, in any of the shapes that people have
        sidecar         images with a .txt or .caption file beside each (kohya)
        parallel        a folder of images and a folder of caption files: images/7.jpg, captions/7.txt
        unsplash-lite   photos.tsv000 or .csv000 of the Unsplash Lite dataset, or a scraper's manifest.json
        sbu             SBU Captions: lines, JSON, or what img2dataset fetched
        stanford-dogs   Images/, Annotation/ and the .mat lists, unpacked or as tars
        dreambooth      the DreamBooth dataset's folders, with captions from --instance_prompt
        generated       a folder of generate_images.py: each image and its prompt
        webdataset      tar shards, 'shards/{00000..00012}.tar'
        hub             a dataset on the Hugging Face Hub by name, or a folder that `datasets` wrote
Reads   PATH or DIR, which is never changed.
Writes  a new folder with train/, validation/ and test/, each with its images and its metadata.jsonl; convert also
        conversion.json with the settings and counts, failures.jsonl with what could not be taken and why, and
        findings.json with what its reader left out and what is to be known.
Go on   after an interrupted convert: the same command again. The others write a new folder whole or not at all.
"""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from finetuning.cli import REQUIRED, flag, run_commands
from finetuning.conversion.sources import FLAGS, SOURCES
from finetuning.conversion.writer import WritingArgs, write_dataset
from finetuning.data.findings import DatasetError, Findings
from finetuning.files import write_json


@dataclass
class SourceArgs:
    """Source"""

    source: str = flag(REQUIRED, "what PATH is", choices=tuple(SOURCES), positional=True)
    path: str = flag(REQUIRED, "folder or file of the source, shard pattern, or Hub name", positional=True)
    allow_outside_paths: bool = flag(False, "let metadata and links reach outside PATH")


@dataclass
class ConvertArgs(*reversed(FLAGS), WritingArgs, SourceArgs):
    """Every flag of convert."""

    def problems(self):
        flags_of = {name: _names(*groups) for name, (_, groups) in SOURCES.items()}
        usual, ours = ConvertArgs(), flags_of.get(self.source, set()) | _names(WritingArgs, SourceArgs)
        for name in sorted(_names(ConvertArgs) - ours):
            if getattr(self, name) != getattr(usual, name):
                owners = " and ".join(source for source, names in flags_of.items() if name in names)
                yield f"--{name} is for {owners}, not for {self.source}"


def _names(*groups):
    return {field.name for group in groups for field in fields(group)}


def convert(args):
    """From any source to one folder. The source is read twice: first for its errors, so that few rows are in memory."""
    findings, (read, _) = Findings(), SOURCES[args.source]
    total = sum(1 for _ in read(args.path, args, findings))
    say = lambda text: print(text, file=sys.stderr)
    findings.refuse(args.path, args.on_bad_rows, say, fix="correct them, or take the rest with")
    if not total:
        report = findings.report()
        raise DatasetError(f"{args.path} holds nothing that could be taken" + (f":\n{report}" if report else ""))
    again = replace(args, download=False)  # what could not be had the first time is not asked for a second time
    write_dataset(read(args.path, again, Findings()), args, min(total, args.limit or total))
    if findings.report():
        write_json(Path(args.output) / "findings.json", findings.as_dict())


def _check():
    from finetuning.conversion.audit import AuditArgs
    from finetuning.conversion.repair import audit

    return AuditArgs, audit


def _augment():
    from finetuning.conversion.augmenting import AugmentArgs, augment

    return AugmentArgs, lambda args: augment(args) and None


def _captions():
    from finetuning.conversion.caption_files import RewriteArgs, rewrite

    return RewriteArgs, lambda args: rewrite(args) and None


COMMANDS = {"convert": (ConvertArgs, convert), "check": _check, "augment": _augment, "captions": _captions}


def main(argv=None):
    """Do what the first word says, and return the exit status."""
    return run_commands(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
