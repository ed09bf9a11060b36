"""The captions of an image folder with their origins, and the journal of a captioning that may be interrupted.

In metadata.jsonl a caption and where it comes from stand side by side: {"file_name": ..., "text": ..., "text_origin":
...}, both a text, or both lists as long as each other. A caption whose origin is not written was there before: "given".
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from finetuning.cli import flag
from finetuning.data.captions import origin_column
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.folders import METADATA_NAMES, SPLIT_NAMES, split_folders
from finetuning.data.reading import named_image, read_folder, read_records
from finetuning.files import read_json_lines, write_json_lines

GIVEN = "given"
JOURNAL = ".captions.jsonl"


@dataclass
class FolderArgs:
    """What becomes of the folder"""

    caption_column: str = flag("text", "metadata key of the caption or list of captions; origins go into KEY_origin")
    add: bool = flag(False, "caption every image, and keep the captions that it has", conflicts="overwrite")
    overwrite: bool = flag(False, "caption every image, and drop the captions that it has, also those of people")
    limit: int | None = flag(None, "caption only so many images, the first by name", min=1, affects_result=False)
    on_bad_rows: str = flag(
        "error", "images that cannot be read: all others are captioned; the exit status is then 1, or 0 with skip",
        choices=("error", "skip"), affects_result=False,
    )  # fmt: skip
    allow_outside_paths: bool = flag(False, "let links reach images outside the folder", affects_result=False)

    def problems(self):
        if self.caption_column in ("none", "file_name"):
            yield f"--caption_column {self.caption_column} cannot hold captions: name another key, such as text"


@dataclass
class Entry:
    """One image of the folder."""

    name: str  # below the folder, with slashes
    image: Path
    home: Path  # the metadata file that gets a row for it, where none has one
    rows: list = field(default_factory=list)  # records that name it
    captions: list = field(default_factory=list)  # of (text, origin)


class CaptionedFolder:
    """The images of every split with their captions.

    Raises DatasetError, with all that is in the way, where captions that are there cannot be kept safe.
    """

    def __init__(self, root, args: FolderArgs, findings: Findings):
        self.root, self.args, self.origin_column = Path(root), args, origin_column(args.caption_column)
        self.documents = {}  # {metadata file: its records}
        self.entries = sorted(self._images(findings), key=lambda entry: entry.name)
        self.bases = sorted({entry.home.parent for entry in self.entries})
        unsafe = Findings()
        self._read_metadata(findings, unsafe)
        for entry in [] if args.overwrite else self.entries:
            if not entry.captions and any(entry.image.with_suffix(end).is_file() for end in (".txt", ".caption")):
                advice = f"`prepare_dataset.py convert sidecar {root} --output NEW`"
                unsafe.error("caption_file_beside", entry.name, advice=advice)
        if unsafe.errors:
            raise DatasetError(f"{root} holds captions that could be lost; correct this first:\n{unsafe.report()}")

    def todo(self):
        """Entries that want a caption."""
        every = self.args.add or self.args.overwrite
        return [entry for entry in self.entries if every or not entry.captions][: self.args.limit]

    def put(self, entry, text, origin):
        """Take a new caption and return True; or False, for an entry that has one, unless a flag says otherwise."""
        kept = [] if self.args.overwrite else entry.captions
        if kept and (not self.args.add or text in [caption for caption, _ in kept]):
            return False
        entry.captions = [*kept, (text, origin)]
        if not entry.rows:
            record = {"file_name": entry.image.relative_to(entry.home.parent).as_posix()}
            self.documents.setdefault(entry.home, []).append(record)
            entry.rows.append(record)
        first, *others = entry.rows  # several rows of one image: what is added goes into the first
        if self.args.overwrite:
            self._set(first, entry.captions)
            for other in others:
                other.clear()  # and it is not written
        else:
            self._set(first, [*self._captions_of(first), (text, origin)])
        return True

    def write(self):
        """Replace each changed metadata file by rename. Captions are all texts, or all lists: Arrow wants one kind."""
        column = self.args.caption_column
        records = [record for records in self.documents.values() for record in records]
        if any(isinstance(record.get(column), list) for record in records):
            for record in records:
                for key in (column, self.origin_column):
                    if isinstance(record.get(key), str):
                        record[key] = [record[key]]
        for path, records in self.documents.items():
            records = [record for record in records if record]
            if path.is_file() and [record for _, record in read_records(path, self.root, Findings())] == records:
                continue
            write_json_lines(path, records)

    def _set(self, record, captions):
        texts, origins = map(list, zip(*captions, strict=True))
        record[self.args.caption_column] = texts if len(texts) > 1 else texts[0]
        record[self.origin_column] = origins if len(origins) > 1 else origins[0]

    def _images(self, findings):
        bases = split_folders(self.root)
        for split in SPLIT_NAMES:
            base = bases.get(split, self.root)
            rows = read_folder(self.root, split, "image", "none", self.args.allow_outside_paths, findings) or []
            for row in rows:
                name = row.image.relative_to(self.root).as_posix()
                if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no text, so no JSON either
                    findings.error("name_not_utf8", ascii(name))
                else:
                    yield Entry(name, row.image, base / "metadata.jsonl")

    def _read_metadata(self, findings, unsafe):
        """The records of each metadata file, and to each image those that name it."""
        by_path = {entry.image: entry for entry in self.entries}
        folders = {self.root, *(folder for path in by_path for folder in path.parents if self.root in folder.parents)}
        files = [folder / name for folder in sorted(folders) for name in METADATA_NAMES]
        advice = f"first `prepare_dataset.py convert imagefolder {self.root} --output NEW`"
        for path in filter(Path.is_file, files):
            if path.suffix != ".jsonl":
                unsafe.error("other_metadata", path.relative_to(self.root), advice=advice)
                continue
            self.documents[path] = []
            for where, record in read_records(path, self.root, unsafe):
                self.documents[path].append(record)
                name = named_image(record, "image") or ""
                captions = self._captions_of(record)
                if Path(name).is_absolute() or PureWindowsPath(name).is_absolute():
                    unsafe.error("absolute_name", where, advice=advice)
                elif captions is None:
                    unsafe.error("not_text", where, column=self.args.caption_column)
                elif entry := self._entry_of(name, path, by_path):
                    entry.rows.append(record)
                    entry.captions += captions
                else:
                    findings.warn("foreign_row", where)

    def _entry_of(self, name, path, by_path):
        """Names count from the metadata's folder, or from a split's; as in training."""
        bases = [base for base in self.bases if base in path.parents or path.parent in base.parents]
        places = (Path(os.path.normpath(folder / name)) for folder in (path.parent, *bases))
        return next((by_path[place] for place in places if place in by_path), None)

    def _captions_of(self, record):
        """[(caption, origin)] of a record; None where it holds something else."""
        texts = record.get(self.args.caption_column)
        texts = texts if isinstance(texts, list) else [texts]
        if not all(text is None or isinstance(text, str) for text in texts):
            return None
        origins = record.get(self.origin_column)
        origins = origins if isinstance(origins, list) else [origins]
        origins = [origin or GIVEN for origin in origins] if len(origins) == len(texts) else [GIVEN] * len(texts)
        return [(text, origin) for text, origin in zip(texts, origins, strict=True) if text and text.strip()]


class Journal:
    """What an interrupted captioning has done: its settings, then a line for each image."""

    def __init__(self, root, settings):
        """Raises DatasetError where the folder holds an interrupted captioning with other settings."""
        self.path, self.settings, self.file = Path(root) / JOURNAL, settings, None
        started, *lines = read_json_lines(self.path) or [settings]
        self.done = {line["name"]: line["text"] for line in lines}
        changed = [key for key, value in settings.items() if started.get(key) != value]
        if self.done and changed:
            raise DatasetError(
                f"{root} holds an interrupted captioning with other settings ({', '.join(changed)}): give the same "
                f"ones to go on, or remove {self.path} and with it {len(self.done)} captions"
            )

    def add(self, name, text):
        """Take an image's caption, at once on the disk."""
        if self.file is None:
            self.file = open(self.path, "a" if self.done else "w", encoding="utf-8")  # noqa: SIM115 (until the end)
            self.file.write("\n" if self.done else json.dumps(self.settings) + "\n")  # it may end in half a line
        self.done[name] = text
        self.file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
        self.file.flush()

    def remove(self):
        """Once all that it holds stands in the metadata."""
        if self.file:
            self.file.close()
        self.path.unlink(missing_ok=True)
