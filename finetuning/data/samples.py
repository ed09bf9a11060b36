"""What a reader of some source hands to the writer, and how it looks through folders, tars and caption files."""

import io
import os
import string
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from finetuning.cli import flag
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import SPLIT_NAMES, DatasetError

SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}  # "val" -> "validation"
BESIDE_SPLITS = "images beside the folders of splits (move them into one)"


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar: where its bytes are, so that nothing has to be unpacked."""

    archive: Path
    offset: int
    size: int

    def read(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Cell:
    """An image inside a Hugging Face dataset: its encoded bytes come from the memory-mapped table when asked for."""

    column: object  # a column of Image(decode=False): {"bytes": ..., "path": ...} for each row
    row: int
    folders: tuple[Path, ...]  # where a row that is only a path may lead; empty: anywhere on this machine

    def read(self):
        """Raises UnreadableImage where there is none, or where it is outside the folders."""
        value = self.column[self.row] or {}
        if value.get("bytes"):
            return value["bytes"]
        if not value.get("path"):
            raise UnreadableImage("the row has no image")
        path = Path(value["path"]).resolve()
        if self.folders and not any(folder in path.parents for folder in self.folders):
            raise UnreadableImage(
                f"{value['path']} is outside the dataset (--allow_outside_paths permits it for a file of this machine)"
            )
        return path.read_bytes()


@dataclass(frozen=True)
class Sample:
    """One image of a source and what is said of it."""

    name: str  # unique in its split of the source, with the image's ending if known: "n02085620-Chihuahua/7.jpg"
    image: Path | Member | Cell  # the last two have read(), the file's bytes
    captions: tuple[str, ...]
    origin: str  # where a person finds it, for messages
    split: str | None = None  # train, validation or test where the source says so; none: drawn from the content
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels: the part to keep

    @property
    def key(self):
        """Unique in the source."""
        return f"{self.split or ''}:{self.name}"

    def open(self):
        """The RGB image. Raises UnreadableImage."""
        if isinstance(self.image, Path):
            return open_rgb(self.image)
        try:
            image = Image.open(io.BytesIO(self.image.read()))
        except Exception as error:  # on broken files the decoders raise more than OSError
            raise UnreadableImage(f"{self.origin}: {error}") from error
        image.filename = self.origin  # so that what goes wrong while decoding is told of it
        return open_rgb(image)


def existing_folder(path):
    """The folder of a source. Raises DatasetError."""
    if not Path(path).is_dir():
        raise DatasetError(f"there is no folder {path}")
    return Path(path)


def walk(top, allow_outside_paths, findings, root=None):
    """Yield (folder, names of its files) from `top` down, sorted, without hidden ones.

    Links are followed; those that lead out of `root` (none: out of `top`) are faults, unless they are allowed.
    """
    root = root or top
    real_root, known = os.path.realpath(root), set()

    def stays(path):
        if allow_outside_paths or not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(real_root):
            return True
        kind = "links that lead out of the folder (--allow_outside_paths follows them)"
        findings.faults[kind].append(str(path.relative_to(root)))
        return False

    def is_file(path):
        if path.is_file():
            return True
        findings.faults["links that lead nowhere, and special files"].append(str(path.relative_to(root)))
        return False

    def unreadable(error):
        findings.faults["folders that cannot be read"].append(f"{error.filename} ({error.strerror})")

    if top != root and not stays(top):
        return
    for folder, below, files in os.walk(top, onerror=unreadable, followlinks=True):
        folder, real = Path(folder), os.path.realpath(folder)
        if real in known:  # a link that leads in a circle
            below.clear()
            continue
        known.add(real)
        files, below[:] = (
            sorted(name for name in names if not name.startswith(".") and stays(folder / name))
            for names in (files, below)
        )
        yield folder, [name for name in files if is_file(folder / name)]


def split_folders(root, names):
    """{name: split} of those names of folders in a source that mean a split. Raises DatasetError for two of one."""
    found = {name: split for name, split in SPLIT_OF.items() if name in names}
    alike = {split: [name for name in found if found[name] == split] for split in found.values()}
    if twice := [f"{' and '.join(names)} ({split})" for split, names in alike.items() if len(names) > 1]:
        raise DatasetError(f"{root} has several folders for one split: {', '.join(twice)}: put them into one")
    return found


def place_in_split(inside, folders, findings):
    """(split, path below its folder) of an image's path inside a source that has these folders of splits.

    The split is None where there are no such folders. Images beside them are for training; where train/ is one of
    them they are faults, and both are None.
    """
    first = inside.parts[0]
    if first in folders:
        return folders[first], inside.relative_to(first)
    if "train" in folders.values():
        findings.faults[BESIDE_SPLITS].append(str(inside))
        return None, None
    return ("train" if folders else None), inside


def members(archive, findings):
    """Yield (name, Member) of each file in a tar, in its order. What cannot be read of it is a fault."""
    length = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as tar:
            while info := tar.next():
                tar.members.clear()  # or all entries of a large tar stay in memory
                if info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"{info.name} is cut off")
                if info.isreg() and not info.issparse():
                    yield info.name, Member(archive, info.offset_data, info.size)
                elif not info.isdir():
                    findings.faults["links and special files in a tar (pack the files themselves)"].append(
                        f"{archive}/{info.name}"
                    )
            _check_end(tar)
    except tarfile.ReadError as error:
        if _is_compressed(archive):
            findings.faults["compressed tars (gunzip them: in a plain tar every file has its place)"].append(
                str(archive)
            )
        else:
            findings.faults["damaged tars (what stands before the damage is taken)"].append(f"{archive} ({error})")


def _check_end(tar):
    """`tarfile` stops without a word where a header is cut or broken. Raises ReadError."""
    tar.fileobj.seek(tar.offset)
    first = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without a tar's end mark: cut off, or not written to its end")
    if first.strip(b"\0") or any(part.strip(b"\0") for part in iter(partial(tar.fileobj.read, 1 << 20), b"")):
        raise tarfile.ReadError(f"something stands behind byte {tar.offset} that is no file: damaged, or joined tars")


def _is_compressed(path):
    magics = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
    with open(path, "rb") as file:
        return file.read(6).startswith(magics)


@dataclass
class ColumnArgs:
    """Columns (imagefolder, hub)"""

    image_column: str = flag("image", "metadata key or column of the image, besides file_name")
    caption_column: str = flag("text", "metadata key or column of the caption or list of captions")


@dataclass
class CaptionFileArgs:
    """Caption files"""

    caption_lines: str = flag(
        "all", "a caption file with several lines: each is a caption of its own, or the first one counts",
        choices=("all", "first"),
    )  # fmt: skip


def caption_lines(content, which):
    """The captions in a text file's bytes: each line, or ("first") the first. Raises UnicodeDecodeError."""
    # not splitlines(), which also splits at characters that may stand inside a caption, such as U+2028
    lines = tuple(line.strip() for line in content.decode("utf-8-sig").split("\n") if line.strip())
    return lines[:1] if which == "first" else lines


def template_problems(flag, templates, words):
    """Yield what is wrong with caption templates that may use {word} for each of `words`."""
    known = ", ".join(f"{{{word}}}" for word in words)
    for template in templates:
        try:
            used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
            if unknown := [f"{{{name}}}" for name in used if name not in words]:
                yield f"{flag} {template!r} has {', '.join(unknown)}: only {known} are filled in"
            elif not template.format(**dict.fromkeys(words, "word")).strip():
                yield f"{flag} {template!r} gives an empty caption"
        except ValueError as error:  # a single brace, an unknown format
            yield f"{flag} {template!r}: {error}"
