"""Folders are whole or not there, also when the process is killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from finetuning import files
from finetuning.files import (
    BrokenFolder,
    atomic_file,
    atomic_folder,
    atomic_result,
    check_manifest,
    remove_leftovers,
    sha256,
    write_json,
    write_manifest,
)


def contents(folder):
    """{relative path: text} of every file but the manifest."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    """A whole folder with a file in a folder of its own."""
    target = tmp_path / "run" / "checkpoint-4"
    with atomic_folder(target) as folder:
        (folder / "unet").mkdir()
        (folder / "unet/weights").write_text("old weights")
        (folder / "state.json").write_text("{}")
    return target


# -- atomic_folder ----------------------------------------------------------------------------------------------------


def test_a_new_folder_replaces_the_old_one_entirely(checkpoint):
    assert contents(checkpoint) == {"unet/weights": "old weights", "state.json": "{}"}
    check_manifest(checkpoint)
    with atomic_folder(checkpoint) as folder:
        (folder / "new").write_text("new")
        assert contents(checkpoint)["unet/weights"] == "old weights"  # until the new one is whole
    assert contents(checkpoint) == {"new": "new"}
    assert names(checkpoint.parent) == ["checkpoint-4"]
    check_manifest(checkpoint)


@pytest.mark.parametrize("trouble", [OSError("disk full"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_folder_and_no_leftover(trouble, checkpoint):
    with pytest.raises(type(trouble)), atomic_folder(checkpoint) as folder:
        (folder / "half").write_text("half")
        raise trouble
    assert contents(checkpoint) == {"unet/weights": "old weights", "state.json": "{}"}
    assert names(checkpoint.parent) == ["checkpoint-4"]
    check_manifest(checkpoint)


KILLED = """
import os, signal, sys
from finetuning import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

real, moment = os.rename, sys.argv[2]
if moment == "before the first rename":
    os.rename = die
elif moment == "between the renames":
    def once(*paths):
        real(*paths)
        os.rename = die
    os.rename = once
with files.atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    if moment == "while writing":
        die()
"""


@pytest.mark.parametrize("moment", ["while writing", "before the first rename", "between the renames"])
def test_a_kill_costs_no_more_than_the_folder_being_written(moment, checkpoint, root):
    done = subprocess.run([sys.executable, "-c", KILLED, checkpoint, moment], cwd=root, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert any(name.startswith(".incomplete-") for name in names(checkpoint.parent))
    remove_leftovers(checkpoint.parent)
    assert contents(checkpoint) == {"unet/weights": "old weights", "state.json": "{}"}
    assert names(checkpoint.parent) == ["checkpoint-4"]
    check_manifest(checkpoint)


def test_a_folder_that_was_replaced_goes_where_its_successor_stands(checkpoint):
    shutil.copytree(checkpoint, checkpoint.parent / ".incomplete-old-checkpoint-4-123")
    with atomic_folder(checkpoint) as folder:
        (folder / "new").write_text("new")
    remove_leftovers(checkpoint.parent)
    assert contents(checkpoint) == {"new": "new"} and names(checkpoint.parent) == ["checkpoint-4"]


def test_leftovers_are_told_from_what_belongs_to_others(checkpoint):
    (checkpoint.parent / "checkpoint-best").mkdir()
    (checkpoint.parent / "args.json").write_text("{}")
    (checkpoint.parent / ".incomplete-checkpoint-8-77").mkdir()
    remove_leftovers(checkpoint.parent)
    assert names(checkpoint.parent) == ["args.json", "checkpoint-4", "checkpoint-best"]


def test_leftovers_of_one_folder_alone(checkpoint):
    for name in ("a-1", "a-b-1", "old-a-2", "old-b-3"):
        (checkpoint.parent / f".incomplete-{name}").mkdir()
    remove_leftovers(checkpoint.parent, "a")
    assert names(checkpoint.parent) == [".incomplete-a-b-1", ".incomplete-old-b-3", "a", "checkpoint-4"]


# -- check_manifest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "unet/weights is missing"),
        ("old wei", "unet/weights has 7 bytes, not 11"),
        ("old weighty", "the content of unet/weights has changed"),
    ],
)
def test_the_file_that_is_broken_is_named(content, said, checkpoint):
    (checkpoint / "unet/weights").unlink()
    if content is not None:
        (checkpoint / "unet/weights").write_text(content)
    with pytest.raises(BrokenFolder, match=said):
        check_manifest(checkpoint)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"unet/weights": 11}'])
def test_a_folder_without_a_readable_manifest_is_broken(manifest, checkpoint):
    (checkpoint / "manifest.json").unlink()
    if manifest is not None:
        (checkpoint / "manifest.json").write_text(manifest)
    with pytest.raises(BrokenFolder, match=r"no readable manifest\.json"):
        check_manifest(checkpoint)


def test_the_manifest_lists_sizes_and_hashes(checkpoint):
    listed = json.loads((checkpoint / "manifest.json").read_text())
    assert listed["state.json"] == {"bytes": 2, "xxh3_128": xxhash.xxh3_128_hexdigest(b"{}")}
    assert sorted(listed) == ["state.json", "unet/weights"]


def test_sha256_of_a_file_longer_than_one_block(tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(3 * 2**20))
    # as `head -c 3M /dev/zero | sha256sum` says
    assert sha256(tmp_path / "zeros") == "bbd05cf6097ac9b1f89ea29d2542c1b7b67ee46848393895f5a9e43fa1f621e5"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_asks_for(mask, mode, tmp_path):
    """safetensors writes 0600, which nobody else on a shared machine can read."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/weights").touch(mode=0o600)
    before = os.umask(mask)
    try:
        write_manifest(tmp_path)
        assert os.umask(mask) == mask  # write_manifest has to look at the mask without changing it
    finally:
        os.umask(before)
    assert (tmp_path / "unet/weights").stat().st_mode & 0o777 == mode
    assert (tmp_path / "manifest.json").stat().st_mode & 0o777 == mode


# -- atomic_file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def killed_while_writing(tmp_path):
    """A folder in which a process was killed, by nothing that it could catch, while it wrote facts.json anew."""
    write_json(tmp_path / "facts.json", "before")
    code = f"""
import os, signal
from finetuning.files import atomic_file
with atomic_file({str(tmp_path / "facts.json")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(files.__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == -signal.SIGKILL
    return tmp_path


@pytest.mark.parametrize("clear", [remove_leftovers, lambda folder: write_json(folder / "facts.json", "before")])
def test_a_kill_leaves_the_file_as_it_was_and_what_else_it_leaves_goes(killed_while_writing, clear):
    """With the leftovers of a run, or with the next attempt."""
    folder = killed_while_writing
    assert json.loads((folder / "facts.json").read_text()) == "before" and len(list(folder.iterdir())) == 2
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["facts.json"]
    assert json.loads((folder / "facts.json").read_text()) == "before"


def test_an_exception_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "facts.json", "before")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "facts.json") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    assert json.loads((tmp_path / "facts.json").read_text()) == "before"


# -- atomic_result --------------------------------------------------------------------------------------------------


def write_pipeline(folder, content="new"):
    (folder / "model_index.json").write_text(content)
    for part in ("unet", "zebra"):  # one before and one after model_index.json in the alphabet
        (folder / part).mkdir()
        (folder / part / "weights").write_text(content)


@pytest.fixture
def output(checkpoint):
    """A run's folder: an older pipeline with a file that the new one has not, a checkpoint, a log."""
    folder = checkpoint.parent
    write_pipeline(folder, "old")
    (folder / "unet/stale").write_text("old")
    (folder / "metrics.jsonl").write_text("log")
    return folder


def test_a_pipeline_moves_in_and_leaves_what_else_is_there(output):
    atomic_result(output, write_pipeline)
    assert contents(output) == {
        "model_index.json": "new", "unet/weights": "new", "zebra/weights": "new",
        "metrics.jsonl": "log", "checkpoint-4/unet/weights": "old weights", "checkpoint-4/state.json": "{}",
    }  # fmt: skip
    assert not [name for name in names(output) if name.startswith(".incomplete-")]
    listed = json.loads((output / "manifest.json").read_text())
    assert sorted(listed) == ["model_index.json", "unet/weights", "zebra/weights"]


def test_the_index_goes_first_and_comes_back_last(output, monkeypatch):
    moved, real = [], os.rename

    def watched(source, target):
        moved.append((Path(target).name, (output / "model_index.json").exists()))
        real(source, target)

    monkeypatch.setattr(files.os, "rename", watched)
    atomic_result(output, write_pipeline)
    assert [index_there for _, index_there in moved] == [False] * 4
    assert moved[-1][0] == "model_index.json"


def test_a_pipeline_that_cannot_be_written_leaves_the_older_one(output):
    before = contents(output)

    def fail(folder):
        write_pipeline(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_result(output, fail)
    assert contents(output) == before
