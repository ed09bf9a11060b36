"""`prepare_dataset.py check`: the audit as text and page, and the corrected copy that --fix writes.

NEW_DIR/ is what conversion/writer.py describes, and fixes.jsonl: a line for everything that is not as it was.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from PIL import Image

from finetuning.conversion import imagefolder
from finetuning.conversion.audit import CONCERNS, AuditArgs, examine, is_tiny
from finetuning.conversion.audit_report import page, report
from finetuning.conversion.caption_text import tidy
from finetuning.conversion.writer import ENDINGS, SPLITS, WritingArgs, write_dataset
from finetuning.data.findings import PROBLEMS, DatasetError, Findings
from finetuning.data.images import has_other_colours, orientation
from finetuning.files import write_json_lines, write_text


def audit(args: AuditArgs, say=print):
    """Check a folder, and do what the flags ask for; exit status 0 where training would accept it as it stands."""
    found = examine(args)
    say(report(found))
    if args.html:
        write_text(args.html, page(found))
        say(f"\n{args.html}: the same with images")
    if args.fix:
        repair(found, say)
    return 0 if found.accepted else 1


def repair(found, say=print):
    """Write the corrected copy of an examined folder; {split: how many}. Raises DatasetError.

    Left out are rows that training would refuse, tiny images, copies within a split, and, of copies in several
    splits, those in train (or in validation, where test has one too). Captions are written tidily.
    """
    folder = Path(found.args.fix)
    if found.refusal:
        raise DatasetError(f"--fix {folder}: nothing is written before PATH can be read: {found.refusal}")
    fixes = _left_out(found)
    samples = list(_samples(found, fixes))
    if not samples:
        raise DatasetError(f"--fix {folder}: nothing of {found.path} is left")
    how = WritingArgs(str(folder), on_bad_rows="skip", workers=found.args.workers)
    counts = write_dataset(samples, how, total=len(samples), say=say)
    write_json_lines(folder / "fixes.jsonl", fixes)
    kinds = Counter(fix["change"] for fix in fixes)
    changes = ", ".join(f"{count} {change}" for change, count in kinds.items()) or "nothing had to be changed"
    say(f"{folder / 'fixes.jsonl'}: {changes}")
    return counts


def _left_out(found):
    """What is not in the copy because it could not be read, and names that were absolute."""
    fixes = []
    for findings in (found.findings, found.test_findings):
        for level, code, sentence, _, examples in findings.kinds():
            change = "left out" if level == "error" else "name made relative" if code == "moved" else None
            fixes += [
                {"change": change, "code": code, "why": sentence, "where": one.where, "reason": one.reason}
                for one in examples
                if change
            ]
    return fixes


def _samples(found, fixes):
    """The samples of the copy; what differs from the source goes into `fixes`."""
    of_place = {(one.split, one.image): one for one in found.seen}
    unwanted = _unwanted(found)
    findings = Findings()
    for sample in imagefolder.read(found.path, found.args, findings):
        split = sample.split or "train"
        one = of_place.get((split, sample.image))
        if one is None:
            continue  # among the errors
        about = {"where": one.origin, "image": found.shown(one)}
        tidied = one.captions
        if found.args.caption_column != "none":
            tidied = tuple(dict.fromkeys(text for text in map(tidy, one.captions) if text))
        why = unwanted.get((split, one.image)) or (None if tidied else "no caption is left of invisible characters")
        if why:
            fixes.append({"change": "left out", "why": why, **about, "captions": one.captions})
            continue
        if tidied != one.captions:
            fixes.append({"change": "caption written tidily", **about, "before": one.captions, "after": tidied})
        fixes += [{"change": change, **about} for change in _rewritten(one.image)]
        yield replace(sample, captions=tidied, split=split)
    why = PROBLEMS["beside_splits"][0]
    fixes += [{"change": "left out", "why": why, "where": one.where} for one in findings.errors["beside_splits"]]


def _unwanted(found):
    """{(split, image): why it is left out}."""
    groups = defaultdict(list, {concern.code: concern.groups for concern in found.concerns})
    out = {
        (one.split, one.image): f"tiny: {one.measures.width} x {one.measures.height}"
        for one in found.seen
        if is_tiny(one.measures, found.args)
    }
    for group in groups["same_twice"]:
        first = {}
        for one in group:
            kept = first.setdefault(one.split, one)
            if kept is not one:
                out.setdefault((one.split, one.image), f"the same image as {found.shown(kept)}")
    for code in ("same_leak", "near_leak"):
        for group in groups[code]:
            rest = [one for one in group if (one.split, one.image) not in out]
            kept = max(rest, key=lambda one: SPLITS.index(one.split), default=None)
            for one in rest:
                if one.split != kept.split:
                    out[one.split, one.image] = f"{CONCERNS[code][0]}: {found.shown(kept)}"
    return out


def _rewritten(path):
    """In words, how the written image differs from its file."""
    with Image.open(path) as image:
        if orientation(image) is None:
            yield "EXIF that cannot be read dropped"
        elif orientation(image) != 1:
            yield "turned upright as its EXIF says"
        if has_other_colours(image):
            yield "colours brought to sRGB"
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            yield f"first of {frames} frames kept"
        if image.mode not in ("RGB", "L") or "transparency" in image.info:
            yield f"{image.mode} made RGB"
        if image.format not in (*ENDINGS, "MPO"):
            yield f"{image.format} written as PNG"
