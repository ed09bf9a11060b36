"""Write an image folder that training reads as it is, from the samples of any source.

OUTPUT/
    train/ validation/ test/     images, and metadata.jsonl with {"file_name": ..., "text": ...} a line, sorted
    conversion.json              the settings, how many of what, and images that stand in two splits of the source
    failures.jsonl               samples that could not be taken, each with its reason
Interrupted, the same command goes on: what is done stands in .journal.sqlite until the end. A sample whose image or
captions have changed since is taken again, and what has left the source leaves the dataset.
"""

import io
import json
import os
import re
import shutil
import sqlite3
import sys
import time
import unicodedata
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, groupby, islice
from pathlib import Path

import xxhash
from PIL import Image
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, as_dict, flag, flags_without_effect
from finetuning.data.findings import DatasetError, counted
from finetuning.data.folders import is_image_name
from finetuning.data.images import MAX_PIXELS, MAX_PIXELS_TO_SHRINK, UnreadableImage, has_other_colours, orientation
from finetuning.data.samples import Sample
from finetuning.data.threads import in_order
from finetuning.files import atomic_file, overlap, write_json, write_json_lines

SPLITS = ("train", "validation", "test")
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"quality": 95}}
NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f:*?"<>|\ud800-\udfff]')  # some disks, or UTF-8, do not take these
TABLES = """
    PRAGMA locking_mode = EXCLUSIVE;
    BEGIN EXCLUSIVE;
    CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE IF NOT EXISTS done (
        key BLOB PRIMARY KEY, state BLOB, split TEXT, file_name TEXT, bytes INT, captions TEXT, pixels BLOB,
        UNIQUE (split, file_name)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS written (split TEXT, file_name TEXT, PRIMARY KEY (split, file_name));
    COMMIT;
    CREATE TEMP TABLE plan (key BLOB PRIMARY KEY, name TEXT, split TEXT) WITHOUT ROWID;
    CREATE INDEX temp.names ON plan (name);
"""
LONGEST_STEM = 200  # bytes; disks take names of 255, and a number, an ending and a temporary name are still to come


@dataclass
class WritingArgs:
    """What is written"""

    output: str = flag(REQUIRED, "folder of the new dataset; it is made here, the source is never changed")
    max_side: int | None = flag(None, "make larger images smaller, to this longest side in pixels", min=1)
    image_format: str = flag("keep", "write all images as this", choices=("keep", *FORMATS))
    link: bool = flag(True, "hard-link images that need no change, where that can be; else copy", affects_result=False)
    validation_fraction: float = flag(
        0.05, "share of the images for validation, where the source has no splits", min=0, below=1
    )
    test_fraction: float = flag(0.05, "share for test; an image's content decides, so no copy leaks", min=0, below=1)
    on_bad_rows: str = flag(
        "error", "what to do with images that cannot be taken", choices=("error", "skip"), affects_result=False
    )
    limit: int | None = flag(None, "take only this many samples, the first in the source's order", min=1)
    workers: int | None = flag(None, "threads that decode and encode (none: one a core)", min=1, affects_result=False)

    def problems(self):
        if self.validation_fraction + self.test_fraction >= 1:
            yield "--validation_fraction and --test_fraction leave nothing to train on"


def write_dataset(samples, args: WritingArgs, total=None, say=print):
    """Write every sample; {split: how many}. `samples` may be a generator: memory does not grow with their number.

    Raises DatasetError where the folder is not this conversion's, where the disk refuses, and where images cannot
    be taken, unless --on_bad_rows skip: all others are written by then, and the same command goes on.
    """
    folder = Path(args.output)
    try:
        for source in (getattr(args, name, None) for name in ("path", "images")):
            if source and Path(source).exists() and overlap(folder, source):  # and would be read as part of it
                raise DatasetError(f"--output {folder} and {source} lie one in the other: name a folder apart")
        with _open_journal(folder, args) as journal:
            failed = _write_all(folder, samples, args, journal, total)
            if failed and args.on_bad_rows == "error":
                raise DatasetError(_failures_message(folder, failed))
            counts = _finish(folder, args, journal, failed, say)
        (folder / ".journal.sqlite").unlink()
    except KeyboardInterrupt:
        say(f"interrupted: what is done stands in {folder}, and the same command goes on")
        raise
    except (OSError, sqlite3.Error) as error:
        fix = "put that right and give the same command again: what is done is kept"
        raise DatasetError(f"{folder} is not finished: {error}\n  {fix}") from error
    return counts


@contextmanager
def _open_journal(folder, args):
    """The database of what is done, locked against a second conversion into the same folder.

    done: a row of the dataset for each sample. written: every image that was ever written, to clear those away that
    no row means any longer. plan: the samples of this run, and the names that they have claimed.
    """
    path = folder / ".journal.sqlite"
    if not path.is_file():
        if (folder / "conversion.json").is_file():
            raise DatasetError(f"--output {folder} holds a finished dataset: name another folder")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(f"--output {folder} is not an empty folder: name another one")
        folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=1)) as journal:
        try:
            journal.executescript(TABLES)
        except sqlite3.OperationalError as error:
            raise DatasetError(f"--output {folder}: {error} (is another conversion writing into it?)") from error
        _refuse_other_settings(journal, folder, args)
        try:
            yield journal
        finally:
            journal.commit()


def _refuse_other_settings(journal, folder, args):
    harmless = flags_without_effect(type(args))
    now = {name: json.dumps(value) for name, value in as_dict(args).items() if name not in harmless}
    before = dict(journal.execute("SELECT name, value FROM settings"))
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        holds = f"--output {folder} holds an interrupted conversion with other settings ({', '.join(changed)})"
        raise DatasetError(f"{holds}: give the same ones to go on, or name another folder")
    journal.executemany("INSERT OR IGNORE INTO settings VALUES (?, ?)", now.items())


def _write_all(folder, samples, args, journal, total):
    """Take every sample that is not done yet; how many could not be taken."""
    failed, committed = 0, time.monotonic()
    work = lambda one: _write_one(folder, args, *one)
    with (
        open(folder / "failures.jsonl", "w", encoding="utf-8", errors="backslashreplace") as failures,
        tqdm(desc="converting", unit="image", total=total) as bar,
        _quick_turns(),
        closing(_todo(folder, islice(samples, args.limit), journal, bar)) as todo,
        closing(in_order(work, todo, args.workers)) as results,
    ):
        for (sample, stem, state), result in results:
            bar.update()
            if isinstance(result, str):
                failed += 1
                if stem:  # what was taken of it earlier is not so any longer
                    journal.execute("DELETE FROM done WHERE key = ?", [sample.key])
                failure = {"name": sample.name, "where": sample.origin, "reason": result}
                failures.write(json.dumps(failure, ensure_ascii=False) + "\n")
                continue
            journal.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?, ?)", (sample.key, state, *result))
            journal.execute("INSERT OR IGNORE INTO written VALUES (?, ?)", result[:2])
            if time.monotonic() - committed > 1:
                journal.commit()
                committed = time.monotonic()
    if not failed:
        (folder / "failures.jsonl").unlink()
    return failed


@contextmanager
def _quick_turns():
    """Python gives a waiting thread its turn after 5 ms, which is longer than most images take to decode."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _todo(folder, samples, journal, bar):
    """(sample, name of its file without ending, state of its source) of each sample that is not done as it stands.

    The name is None where the sample's own name is not unique.
    """
    for sample in samples:
        stem = _claim_name(journal, sample)
        state = _state(sample, stem)
        found = journal.execute(
            "SELECT split, file_name, bytes FROM done WHERE key = ? AND state = ?", [sample.key, state]
        ).fetchone()
        file = folder.joinpath(*found[:2]) if found and stem else None
        if file and file.is_file() and file.stat().st_size == found[2]:
            bar.update()
        else:
            yield sample, stem, state


def _claim_name(journal, sample):
    """A file name that no other sample of the split has: folders become part of it, and no two collide."""
    split, stem = sample.split or "", _stem(sample.name)
    taken = "SELECT 1 FROM plan WHERE name = ? AND (split = ? OR split = '' OR ? = '')"
    for number in count(1):
        numbered = stem if number == 1 else f"{stem}~{number}"
        # some disks take names for equal that differ in case, or in how an accent is written
        name = unicodedata.normalize("NFC", numbered).casefold()
        if not journal.execute(taken, [name, split, split]).fetchone():
            added = journal.execute("INSERT OR IGNORE INTO plan VALUES (?, ?, ?)", [sample.key, name, split])
            return numbered if added.rowcount else None


def _stem(name):
    """`dogs/7.jpg` -> `dogs-7`, without what some disks do not take."""
    bare, ending = os.path.splitext(name)
    parts = re.split(r"[/\\]+", bare if is_image_name(ending and f"x{ending}") else name)
    stem = NOT_IN_NAMES.sub("_", "-".join(part for part in parts if part.strip(". "))).strip(". ") or "image"
    return shortened(stem)


def shortened(stem):
    """A file's name without ending, cut to what every disk takes; what is cut off goes on in a hash."""
    whole = stem.encode()
    if len(whole) <= LONGEST_STEM:
        return stem
    return f"{whole[: LONGEST_STEM - 17].decode(errors='ignore')}~{xxhash.xxh3_64_hexdigest(whole)}"


def _state(sample, stem):
    """A digest of what the row of a sample hangs on: the same sample with another is taken again."""
    image = sample.image
    file = image if isinstance(image, Path) else getattr(image, "archive", None)
    place = (file, *(getattr(image, part, None) for part in ("offset", "size", "row")))
    try:
        stamp = file and (os.stat(file).st_size, os.stat(file).st_mtime_ns)
    except OSError:
        stamp = None  # taking it will say what is wrong
    whole = ascii((stem, place, stamp, sample.captions, sample.split, sample.box))
    return xxhash.xxh3_128_digest(whole.encode())


def _write_one(folder, args, sample: Sample, stem, state):
    """(split, file name, bytes, captions, digest) of a sample whose image is written now; or, as text, why not."""
    if stem is None:
        return "another sample of the source has the same name"
    if not sample.captions:
        return "it has no caption"
    captions = json.dumps(sample.captions, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", captions):
        return "its caption holds half a character (a lone surrogate)"
    try:
        whole = sample.open(MAX_PIXELS_TO_SHRINK if args.max_side else MAX_PIXELS)
        content = sample.image if isinstance(sample.image, Path) else sample.image.read_bytes()
    except (UnreadableImage, OSError) as error:
        return str(error)
    digest = xxhash.xxh3_128(repr(whole.size).encode())
    digest.update(whole.tobytes())
    digest = digest.digest()
    image = _shaped(whole, sample.box, args.max_side)
    if image is None:
        return f"nothing of the image is inside the box {sample.box}"
    has, usable = _kind(content)
    wanted = FORMATS.get(args.image_format) or (has if has in ENDINGS else "PNG")
    if image is not whole or has != wanted or not usable:
        try:
            content = encoded(image, wanted)
        except (OSError, ValueError) as error:
            return f"it cannot be written as {wanted}: {error}"
    place = int.from_bytes(digest[:8], "big") / 2**64
    drawn = "validation" if place < args.validation_fraction else "test"
    split = sample.split or (drawn if place < args.validation_fraction + args.test_fraction else "train")
    target = folder / split / f"{stem}{ENDINGS[wanted]}"
    _put(content, target, args.link)
    return split, target.name, target.stat().st_size, captions, digest


def _shaped(image, box, max_side):
    """The image cut to the box and made smaller, itself where neither is asked, None where the box is empty."""
    if box:
        left, top = max(0, box[0]), max(0, box[1])
        right, bottom = min(image.width, box[2]), min(image.height, box[3])
        if left >= right or top >= bottom:
            return None
        if (right - left, bottom - top) != image.size:
            image = image.crop((left, top, right, bottom))
    if max_side and max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def _kind(content):
    """(format of an image file, whether it looks the same everywhere as it is)."""
    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
        upright = orientation(image) == 1 and not has_other_colours(image)
        if image.format == "MPO":  # a phone's JPEG with a second image behind, which nobody looks at
            return "JPEG", image.mode == "RGB" and upright
        usable = (
            image.format in ENDINGS
            and image.mode in ("RGB", "L")
            and "transparency" not in image.info
            and getattr(image, "n_frames", 1) == 1
            and upright
        )
        return image.format, usable


def encoded(image, wanted):
    """The bytes of an image file. A colour profile stays, as the pixels still mean what it says."""
    profile = image.info.get("icc_profile") or b""
    file = io.BytesIO()  # not the disk itself: its errors are no fault of the image
    # the profile of a CMYK or grey original says nothing about the RGB that was made of it
    image.save(file, wanted, icc_profile=profile if profile[16:20] == b"RGB " else b"", **OPTIONS[wanted])
    return file.getvalue()


def _put(content, target, link):
    """Bytes, or the file at a path, to where `target` says, whole or not at all."""
    with atomic_file(target, sync=False) as temporary:
        temporary.unlink(missing_ok=True)  # it may be a link to the source, which must not be written to
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            take_over(content, temporary, link)
        target.unlink(missing_ok=True)  # a rename does nothing where both are links to the same file


def take_over(source, target, link):
    """A file as a hard link to `source` or, where that cannot be or is not wanted, as a copy."""
    if link:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass  # another disk, or one without hard links, or a file of another user: copied below
    shutil.copyfile(source, target)


def _failures_message(folder, failed):
    with open(folder / "failures.jsonl", encoding="utf-8") as file:
        first = [json.loads(line) for line in islice(file, 5)]
    listed = "\n".join(f"  x {one['where']}: {one['reason']}" for one in first)
    return (
        f"{counted(failed, 'image')} could not be taken (all in {folder / 'failures.jsonl'}):\n{listed}\n"
        "  correct them and give the same command again, or take the rest with --on_bad_rows skip"
    )


def _finish(folder, args, journal, failed, say):
    """Clear away what has left the source, and write metadata.jsonl of each split and the counts."""
    journal.execute("DELETE FROM done WHERE key NOT IN (SELECT key FROM plan)")
    for place in journal.execute("SELECT split, file_name FROM written EXCEPT SELECT split, file_name FROM done"):
        folder.joinpath(*place).unlink(missing_ok=True)
    counts = {split: 0 for split in SPLITS} | dict(journal.execute("SELECT split, count(*) FROM done GROUP BY split"))
    if not sum(counts.values()):
        raise DatasetError(f"nothing of the source could be taken ({folder / 'failures.jsonl'} says why)")
    # one caption as text, several as a list; not both in one dataset, which Hugging Face `datasets` refuses
    (several,) = journal.execute("SELECT max(json_array_length(captions)) > 1 FROM done").fetchone()
    for split in SPLITS:
        metadata = folder / split / "metadata.jsonl"
        if not counts[split]:  # the source has left a split that an earlier start had images for
            metadata.unlink(missing_ok=True)
            if metadata.parent.is_dir() and not any(metadata.parent.iterdir()):
                metadata.parent.rmdir()
            continue
        rows = journal.execute("SELECT file_name, captions FROM done WHERE split = ? ORDER BY file_name", [split])
        rows = ((name, json.loads(captions)) for name, captions in rows)
        write_json_lines(metadata, ({"file_name": name, "text": own if several else own[0]} for name, own in rows))
    leaks = _leaks(journal)
    write_json(folder / "conversion.json", {
        "settings": as_dict(args),
        "images": counts,
        "failures": failed,
        "same_image_in_two_splits": leaks,
    })  # fmt: skip
    say(f"{folder}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))
    if leaks:
        say(f"  - {counted(len(leaks), 'image')} in two splits of the source (conversion.json lists them)")
    if failed:
        say(f"  x {counted(failed, 'sample')} could not be taken ({folder / 'failures.jsonl'} says which and why)")
    return counts


def _leaks(journal):
    """Images that the source itself has in two splits: [[name, name, ...], ...]."""
    rows = journal.execute(
        """
        SELECT pixels, split || '/' || file_name AS name FROM done WHERE pixels IN
            (SELECT pixels FROM done GROUP BY pixels HAVING count(DISTINCT split) > 1)
        ORDER BY pixels, name
        """
    )
    return [[name for _, name in same] for _, same in groupby(rows, key=lambda row: row[0])]
