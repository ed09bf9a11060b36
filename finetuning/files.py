"""Files and folders that are whole or not there: written to a temporary sibling, synced, hashed, renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from finetuning.cli import UserError

MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete-"


class BrokenFolder(UserError):
    """A folder whose files are not those that its manifest lists; the message says which."""


@contextmanager
def atomic_file(target, sync=True):
    """Yield the path of a temporary sibling to write to; on leaving it is synced and renamed to `target`.

    An exception or a kill leaves `target` as it was. `sync=False` is for many small files that can be made again: they
    may be empty after a power cut.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Keeps the suffix, which says the format. Named by the target alone: what a kill leaves goes with the next attempt
    temporary = target.with_name(f"{INCOMPLETE}{target.name}")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        _name_target(error, temporary, target)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _name_target(error, temporary, target):
    """Let an OSError name what was to be written, rather than its temporary sibling, or what was copied there."""
    named = str(error.filename2 or error.filename or target)
    error.filename, error.filename2 = named.replace(str(temporary), str(target)), None


@contextmanager
def writing(path):
    """What libraries raise where a file cannot be written, on a full disk say, as an OSError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except (RuntimeError, SafetensorError) as error:  # torch's RuntimeError does not say why
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"cannot be written, perhaps the disk is full: {reason}", str(path)) from error


def write_image(path, image):
    """Write a PIL image as PNG to a file that is whole or as it was before."""
    with atomic_file(path, sync=False) as temporary:
        image.save(temporary, format="PNG")


@contextmanager
def content_named_file(folder, suffix):
    """Yield a path in `folder` to write to; on leaving it is synced and renamed to the xxh3 of its content.

    Any number of processes may do this in one folder, also with the same content. What a kill left goes after an hour.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{INCOMPLETE}*"):
        with suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
    descriptor, name = tempfile.mkstemp(suffix, INCOMPLETE, folder)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, folder / f"{xxh3(temporary)}{suffix}")
        _sync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def overlap(one, other):
    """Whether two paths are the same folder, or one lies inside the other; links are followed."""
    one, other = Path(one).resolve(), Path(other).resolve()
    return one == other or one in other.parents or other in one.parents


def output_problems(output_dir, inputs, around=False, flag="--output_dir"):
    """Yield why results cannot go to what `flag` names: it is, or lies in, something that is read. `inputs` are paths.

    around  whether it may not hold something that is read either: what it holds is replaced
    """
    output = Path(output_dir).resolve()
    for path in dict.fromkeys(map(str, inputs)):
        read = Path(path).resolve()
        if not Path(path).exists():
            continue
        if read == output or read in output.parents:
            yield f"{flag} {output_dir} lies in {path}, which is read: name a folder outside of it"
        elif around and output in read.parents:
            yield f"{flag} {output_dir} holds {path}, which is read: name another folder"


def read_text(path):
    """The UTF-8 text of a file, without a byte order mark. Raises UserError where it is in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it again as UTF-8") from error


def write_text(path, text):
    """Write UTF-8 text to a file that is whole or as it was before; what UTF-8 does not take is written as \\udc80."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def file_names(texts, most=80):
    """{text: file name}: letters and digits of any script, anything else as "-", cut to `most` bytes.

    Different texts have different names, also where upper and lower case are one: those that would share a name get a
    hash behind it.
    """
    names = {text: _cut(re.sub(r"[^\w.]+", "-", text).strip("-."), most) for text in texts}
    alike = Counter(name.casefold() for name in names.values())
    return {
        text: name if name and alike[name.casefold()] == 1 else f"{name}-{_short_hash(text)}".lstrip("-")
        for text, name in names.items()
    }


def _cut(name, most):
    return name.encode()[:most].decode(errors="ignore")


def _short_hash(text):
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()


def write_json(path, content):
    """Write JSON to a file that is whole or as it was before."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path, rows):
    """Write an iterable as JSON lines, all or none of them."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json_lines(path):
    """The rows of a file that is appended to; lines that are not JSON are left out: a killed run was writing them."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n") if Path(path).is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@contextmanager
def atomic_folder(target):
    """Yield a folder beside `target` to write into; on leaving it is hashed, synced and renamed to `target`.

    An exception or a kill leaves `target` as it was. An older `target` is replaced only once the new one is whole.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{INCOMPLETE}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            _name_target(error, temporary, target)
        raise
    replaced = None
    if target.exists():
        replaced = target.parent / f"{INCOMPLETE}old-{target.name}-{os.getpid()}"
        os.rename(target, replaced)
    os.rename(temporary, target)
    _sync(target.parent)
    if replaced:
        shutil.rmtree(replaced)


def atomic_result(target, write, key="model_index.json"):
    """Let `write(folder)` make the result of a run and move it into `target`, a folder that holds other things too.

    `key`, the file by which readers know the result, goes first and comes back last, so that half of it is not taken
    for a whole one.
    """
    target = Path(target)
    with tempfile.TemporaryDirectory(prefix=f"{INCOMPLETE}result-", dir=target) as temporary:
        temporary = Path(temporary)
        write(temporary)
        write_manifest(temporary)
        (target / key).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == key):
            if (target / path.name).is_dir():
                shutil.rmtree(target / path.name)
            os.rename(path, target / path.name)
        _sync(target)


def write_manifest(folder):
    """Give every file the mode that the umask asks for, sync it, and list its size and hash in manifest.json."""
    folder = Path(folder)
    mode = 0o666 & ~_umask()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {}
    for path in files:
        os.chmod(path, mode)  # safetensors writes 0600, which the next user of a shared machine cannot read
        listed[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_128": xxh3(path)}
        _sync(path)
    write_json(folder / MANIFEST, listed)
    _sync(folder / MANIFEST)
    for below in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _sync(below)
    _sync(folder)


def check_manifest(folder):
    """Raises BrokenFolder unless every file of the manifest is there with its size and hash."""
    folder = Path(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: expected["bytes"] for name, expected in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise BrokenFolder(f"{folder} has no readable {MANIFEST}: {error}") from error
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise BrokenFolder(f"{folder} is broken: {name} is missing")
        size = path.stat().st_size
        if size != sizes[name]:
            raise BrokenFolder(f"{folder} is broken: {name} has {size} bytes, not {sizes[name]}")
        # sha256: of older versions
        if xxh3(path) != expected["xxh3_128"] if "xxh3_128" in expected else sha256(path) != expected["sha256"]:
            raise BrokenFolder(f"{folder} is broken: the content of {name} has changed since it was written")


def remove_leftovers(parent, name=None):
    """Delete what a killed run was still writing in `parent`, or only what was to be `name` there.

    A replaced folder whose successor never came is put back.
    """
    named = () if name is None else (f"{INCOMPLETE}{escape(name)}-[0-9]*", f"{INCOMPLETE}old-{escape(name)}-[0-9]*")
    for path in [path for pattern in named or (f"{INCOMPLETE}*",) for path in Path(parent).glob(pattern)]:
        if path.name.startswith(f"{INCOMPLETE}old-"):
            home = path.parent / path.name.removeprefix(f"{INCOMPLETE}old-").rsplit("-", 1)[0]
            if not home.exists():
                os.rename(path, home)
                continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def xxh3(path):
    """Hex digest of a file, quick, against damage and not against forgery."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
