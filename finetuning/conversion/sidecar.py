"""Captions in a text file beside each picture, as kohya's scripts keep them: room.jpg and room.txt or room.caption."""

import re
from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import flag
from finetuning.conversion.contract import Sample
from finetuning.data.pictures import EXTENSIONS
from finetuning.data.reading import DatasetProblem

CAPTION_ENDINGS = (".caption", ".txt")


@dataclass
class SidecarArgs:
    """Sidecar files (kohya)"""

    caption_lines: str = flag(
        "all", "a caption file with several lines: each is a caption of its own, or the first one counts",
        choices=("all", "first"),
    )  # fmt: skip
    class_captions: bool = flag(
        False, "a picture without a caption file takes the class of its folder, <repeats>_<class>, for its caption"
    )


def read(path, args, findings):
    """Each picture with its caption file; what lacks its other half is a fault, and named."""
    root = Path(path)
    if not root.is_dir():
        raise DatasetProblem(f"there is no folder {root}")
    files = sorted(file for file in root.rglob("*") if file.is_file() and not _hidden(file.relative_to(root)))
    pictures = [file for file in files if file.suffix.lower() in EXTENSIONS]
    if not pictures:
        raise DatasetProblem(f"there are no pictures in {root}")
    used = set()
    for picture in pictures:
        shown = picture.relative_to(root)
        text = next((t for end in CAPTION_ENDINGS if (t := picture.with_suffix(end)).is_file()), None)
        captions = ()
        if text:
            used.add(text)
            captions = _captions(text, root, args, findings)
        elif args.class_captions and (kohya := re.fullmatch(r"(\d+)_(.+)", picture.parent.name)):
            captions = (kohya[2],)
        if captions:
            yield Sample(str(shown), picture, captions, str(shown))
        else:
            findings.faults["pictures without a caption file, or with an empty one"].append(str(shown))
    repeated = {file.parent.name for file in pictures if re.fullmatch(r"([2-9]|\d\d+)_.+", file.parent.name)}
    for name in sorted(repeated):
        note = "folders that kohya repeats N times an epoch (here every picture counts once)"
        findings.notes[note].append(name)
    for text in files:
        if text.suffix in CAPTION_ENDINGS and text not in used:
            findings.faults["caption files without a picture"].append(str(text.relative_to(root)))


def _captions(path, root, args, findings):
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        findings.faults["caption files that are not UTF-8 (save them again as UTF-8)"].append(
            str(path.relative_to(root))
        )
        return ()
    captions = tuple(line.strip() for line in lines if line.strip())
    return captions[:1] if args.caption_lines == "first" else captions


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)
