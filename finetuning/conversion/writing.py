"""Write an image folder that training reads as it is, from the samples of any source.

OUTPUT/
    train/ validation/ test/     pictures, and metadata.jsonl with {"file_name": ..., "text": ...} a line, sorted
    conversion.json              the source, the settings, how many of what
    failures.jsonl               samples that could not be taken, each with its reason
Interrupted, the same command goes on: what is done stands in .journal.jsonl until the end.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, as_dict, flag, write_json
from finetuning.conversion.contract import Sample
from finetuning.data.pictures import UnreadablePicture
from finetuning.data.reading import DatasetProblem

SPLITS = ("train", "validation", "test")
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"quality": 95}}
ORIENTATION = 0x0112  # the EXIF tag


@dataclass
class WritingArgs:
    """What is written"""

    output: str = flag(REQUIRED, "folder of the new dataset; it is made here, the source is never changed")
    max_side: int | None = flag(None, "make larger pictures smaller, to this longest side in pixels")
    image_format: str = flag("keep", "write all pictures as this", choices=("keep", *FORMATS))
    link: bool = flag(True, "hard-link pictures that need no change; copy them where that cannot be or with --no-link")
    validation_fraction: float = flag(0.05, "share of the pictures for validation, where the source has no splits")
    test_fraction: float = flag(0.05, "share for test, likewise; a picture's content decides, so no copy leaks")
    on_bad_rows: str = flag("error", "what to do with what cannot be taken", choices=("error", "skip"))
    limit: int | None = flag(None, "take only this many samples, the first in the source's order")
    workers: int | None = flag(None, "threads that decode and encode (none: one for each core)")

    def problems(self):
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} must be at least 0 and below 1"
        if self.validation_fraction + self.test_fraction >= 1:
            yield "--validation_fraction and --test_fraction leave nothing to train on"
        for name in ("max_side", "limit", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} must be at least 1"


# Settings that do not change what is written: an interrupted conversion may go on with others.
WITHOUT_EFFECT = ("workers", "link", "on_bad_rows")


def write_dataset(samples, args: WritingArgs, say=print):
    """Write every sample; {split: how many}. Few pictures are in work at once, so memory stays flat.

    Raises DatasetProblem where the folder is not this conversion's, and where pictures cannot be taken, unless
    --on_bad_rows skip: all others are written by then, and the same command goes on when those are mended.
    """
    folder = Path(args.output)
    done = _earlier_work(folder, args)
    _start(folder, args)
    failures = {}
    threads = args.workers or len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        open(folder / ".journal.jsonl", "a", encoding="utf-8") as journal,
        tqdm(desc="converting", unit="picture", initial=len(done)) as bar,
    ):
        todo = ((s, name) for s, name in _named(samples, args) if s.key not in done)
        for sample, result in _in_order(pool, lambda item: _write_one(folder, *item, args), todo, 4 * threads):
            bar.update()
            if isinstance(result, str):
                failures[sample.key] = {"name": sample.name, "where": sample.origin, "reason": result}
                continue
            done[sample.key] = result
            journal.write(json.dumps({"key": sample.key, **result}, ensure_ascii=False) + "\n")
            journal.flush()
    _write_lines(folder / "failures.jsonl", failures.values())
    if failures and args.on_bad_rows == "error":
        listed = "\n".join(f"  x {one['where']}: {one['reason']}" for one in list(failures.values())[:5])
        raise DatasetProblem(
            f"{len(failures)} pictures could not be taken (all in {folder / 'failures.jsonl'}):\n{listed}\n"
            "  mend them and give the same command again, or take the rest with --on_bad_rows skip"
        )
    return _finish(folder, args, done, len(failures), say)


def _earlier_work(folder, args):
    """{sample name: its row} that an interrupted run of the same conversion has written."""
    if (folder / "conversion.json").is_file() and not (folder / ".journal.jsonl").is_file():
        raise DatasetProblem(f"--output {folder} holds a finished dataset: name another folder")
    if not (folder / ".journal.jsonl").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise DatasetProblem(f"--output {folder} is not empty: name another folder")
        return {}
    before = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["settings"]
    changed = [name for name, value in _settings(args).items() if before.get(name) != value]
    if changed:
        raise DatasetProblem(
            f"--output {folder} holds an interrupted conversion with other settings ({', '.join(changed)}): give the "
            "same ones to go on, or name another folder"
        )
    done = {}
    for line in (folder / ".journal.jsonl").read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing
        if (folder / row["split"] / row["file_name"]).is_file():
            done[row.pop("key")] = row
    return done


def _start(folder, args):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".journal.jsonl").touch()
    write_json(folder / "conversion.json", {"settings": _settings(args)})


def _settings(args):
    return {name: value for name, value in as_dict(args).items() if name not in WITHOUT_EFFECT}


def _named(samples, args):
    """(sample, name of its file without ending), each name once: folders become part of it, and no two collide."""
    taken = Counter()
    for number, sample in enumerate(samples):
        if number == args.limit:
            return
        stem = "-".join(Path(sample.name).with_suffix("").parts).strip("./")
        place = (sample.split, stem.lower())  # some disks take names for equal that differ in case
        taken[place] += 1
        yield sample, stem if taken[place] == 1 else f"{stem}~{taken[place]}"


def _in_order(pool, work, items, window):
    """(sample, work's result), in order, with no more than `window` under way."""
    waiting = deque()
    for item in items:
        waiting.append((item[0], pool.submit(work, item)))
        if len(waiting) >= window:
            sample, future = waiting.popleft()
            yield sample, future.result()
    for sample, future in waiting:
        yield sample, future.result()


def _write_one(folder, sample: Sample, stem, args):
    """The metadata row and split of a sample whose picture is written now; or why it could not be, as text."""
    if not sample.captions:
        return "it has no caption"
    try:
        picture = sample.open()
    except (UnreadablePicture, OSError) as error:
        return str(error)
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
    split = sample.split or _drawn_split(digest, args)
    changed = picture.crop(sample.box) if sample.box else picture
    if not all(changed.size):
        return f"nothing of the picture is inside the box {sample.box}"
    if args.max_side and max(changed.size) > args.max_side:
        factor = args.max_side / max(changed.size)
        size = tuple(max(1, round(side * factor)) for side in changed.size)
        changed = changed.resize(size, Image.Resampling.LANCZOS)
    has, turned = _kind(sample)
    wanted = FORMATS.get(args.image_format) or (has if has in ENDINGS else "PNG")
    target = folder / split / f"{stem}{ENDINGS[wanted]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    aside.unlink(missing_ok=True)
    if changed is picture and wanted == has and not turned:
        _take_over(sample.picture, aside, args.link)
    else:
        changed.save(aside, wanted, **OPTIONS[wanted])
    os.replace(aside, target)
    text = sample.captions[0] if len(sample.captions) == 1 else list(sample.captions)
    return {"split": split, "file_name": target.name, "text": text, "pixels": digest.hex()}


def _drawn_split(digest, args):
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < args.validation_fraction:
        return "validation"
    return "test" if place < args.validation_fraction + args.test_fraction else "train"


def _kind(sample):
    """(format of the file, whether it has to be written anew to look the same everywhere)."""
    if not isinstance(sample.picture, Path):
        return None, True
    with Image.open(sample.picture) as image:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return image.format, turned or image.mode not in ("RGB", "L") or getattr(image, "n_frames", 1) > 1


def _take_over(source, target, link):
    if link:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass  # another disk, or one without hard links: copied below
    shutil.copyfile(source, target)


def _finish(folder, args, done, failures, say):
    """metadata.jsonl of each split and the counts; the journal goes last."""
    counts, seen = Counter(row["split"] for row in done.values()), {}
    for row in done.values():
        seen.setdefault(row["pixels"], []).append(row)
    leaks = [rows for rows in seen.values() if len({row["split"] for row in rows}) > 1]
    for split in SPLITS:
        rows = sorted((row for row in done.values() if row["split"] == split), key=lambda row: row["file_name"])
        if rows:
            _write_lines(
                folder / split / "metadata.jsonl", [{k: row[k] for k in ("file_name", "text")} for row in rows]
            )
    write_json(folder / "conversion.json", {
        "settings": _settings(args),
        "pictures": {split: counts[split] for split in SPLITS},
        "failures": failures,
        "same_picture_in_two_splits": [[f"{row['split']}/{row['file_name']}" for row in rows] for rows in leaks],
    })  # fmt: skip
    (folder / ".journal.jsonl").unlink()
    say(f"{folder}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))
    if leaks:
        say(f"  - {len(leaks)} pictures stand in two splits of the source (conversion.json lists them)")
    if failures:
        say(f"  x {failures} samples could not be taken ({folder / 'failures.jsonl'} says which and why)")
    return counts


def _write_lines(path, rows):
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)
