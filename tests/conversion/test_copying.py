"""What every changed copy of a dataset has in common, seen through `prepare_dataset.py captions`."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from finetuning.cli import read
from finetuning.conversion.caption_files import RewriteArgs, rewrite
from finetuning.conversion.copying import CopyArgs, new_folder
from finetuning.data.findings import DatasetError


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(folder, rows):
    """Images, all different, and their metadata.jsonl."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, len(folder.name), 0)).save(path)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path / "dogs/train", [
        {"file_name": "b.png", "text": "arafed dog on a sofa"},
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "more/a.png", "text": "a cat, arafed"},
    ])  # fmt: skip
    write(tmp_path / "dogs/validation", [{"file_name": "a.png", "text": "an arafed bird"}])
    return tmp_path / "dogs"


def args(dataset, **flags):
    return RewriteArgs(path=str(dataset), output=str(dataset.parent / "new"), **flags)


def test_no_link_makes_files_of_their_own(dataset):
    rewrite(args(dataset, prefix="sks", link=False), print)
    assert not os.path.samefile(dataset.parent / "new/train/a.png", dataset / "train/a.png")
    assert (dataset.parent / "new/train/a.png").read_bytes() == (dataset / "train/a.png").read_bytes()


def test_a_folder_without_splits_becomes_train(tmp_path):
    write(tmp_path / "dogs", [{"file_name": "images/a.png", "text": "a dog"}])
    rewrite(args(tmp_path / "dogs", prefix="sks"), print)
    assert lines(tmp_path / "new/train/metadata.jsonl") == [{"file_name": "images/a.png", "text": "sks a dog"}]
    assert (tmp_path / "new/train/images/a.png").is_file()


def test_all_splits_go_by_their_usual_names(tmp_path):
    for name in ("training", "dev", "test"):
        write(tmp_path / "dogs" / name, [{"file_name": "a.png", "text": name}])
    rewrite(args(tmp_path / "dogs", prefix="sks"), print)
    found = {path.parent.name: lines(path)[0]["text"] for path in (tmp_path / "new").rglob("metadata.jsonl")}
    assert found == {"train": "sks training", "validation": "sks dev", "test": "sks test"}


def test_other_columns_and_the_caption_columns_name_are_kept(tmp_path):
    write(tmp_path / "dogs", [
        {"file_name": "a.png", "prompt": "a dog", "text": "other", "origin": {"by": "blip", "n": 1}},
        {"file_name": "b.png", "prompt": "a cat"},
    ])  # fmt: skip
    rewrite(args(tmp_path / "dogs", prefix="sks", caption_column="prompt"), print)
    assert lines(tmp_path / "new/train/metadata.jsonl") == [
        {"file_name": "a.png", "prompt": "sks a dog", "text": "other", "origin": {"by": "blip", "n": 1}},
        {"file_name": "b.png", "prompt": "sks a cat"},
    ]


def test_parquet_metadata_is_read_and_its_dates_become_text(tmp_path):
    write(tmp_path / "dogs", [{"file_name": "a.png", "text": "a dog"}])
    (tmp_path / "dogs/metadata.jsonl").unlink()
    day = pyarrow.array([0], pyarrow.date32())
    table = pyarrow.table({"file_name": ["a.png"], "text": ["a dog"], "day": day})
    pyarrow.parquet.write_table(table, tmp_path / "dogs/metadata.parquet")
    rewrite(args(tmp_path / "dogs", suffix="!"), print)
    assert lines(tmp_path / "new/train/metadata.jsonl") == [
        {"file_name": "a.png", "text": "a dog!", "day": "1970-01-01"}
    ]


def test_what_training_refuses_is_refused_all_at_once(dataset):
    Image.new("RGB", (4, 4)).save(dataset / "train/nobody.png")
    with open(dataset / "validation/metadata.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file_name": "gone.png", "text": "a ghost"}\n')
    with pytest.raises(DatasetError) as caught:
        rewrite(args(dataset, prefix="sks"), print)
    message = str(caught.value)
    assert all(word in message for word in ("2 errors", "nobody.png", "gone.png", "--on_bad_rows skip"))
    assert sorted(path.name for path in dataset.parent.iterdir()) == ["dogs"]
    said = []
    rewrite(args(dataset, prefix="sks", on_bad_rows="skip"), said.append)
    assert "nobody.png" in said[0] and "gone.png" in said[0]
    assert not (dataset.parent / "new/train/nobody.png").exists()


def test_images_from_outside_with_one_name_are_kept_apart(tmp_path):
    (tmp_path / "dogs").mkdir()
    for number, name in enumerate(("one/a.png", "two/a.png", "three/A.png")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "dogs/b.png")
    names = ("b.png", "../one/a.png", "../two/a.png", str(tmp_path / "three/A.png"))
    text = "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in names)
    (tmp_path / "dogs/metadata.jsonl").write_text(text, encoding="utf-8")
    rewrite(args(tmp_path / "dogs", prefix="sks", allow_outside_paths=True), print)
    new = lines(tmp_path / "new/train/metadata.jsonl")
    assert len({row["file_name"].lower() for row in new}) == 4
    for row in new:
        source = tmp_path / "dogs" / row["text"].removeprefix("sks ")
        assert os.path.samefile(tmp_path / "new/train" / row["file_name"], source)


def test_what_a_killed_run_left_is_cleared_and_an_empty_folder_is_taken(dataset):
    (dataset.parent / ".new.part/train").mkdir(parents=True)
    (dataset.parent / ".new.part/train/old.png").touch()
    (dataset.parent / "new").mkdir()
    rewrite(args(dataset, prefix="sks"), print)
    assert not (dataset.parent / "new/train/old.png").exists()
    assert not (dataset.parent / ".new.part").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    _, problems = read(RewriteArgs, "", [str(tmp_path / "gone"), "--prefix", "x", "--dry_run"])
    assert len(problems) == 1 and "gone: there is no such folder" in problems[0]


def test_origins_of_captions_go_with_them(tmp_path):
    """What caption_images.py writes beside them, so that a person's caption can be told from a model's."""
    write(tmp_path / "dogs", [
        {"file_name": "a.png", "text": ["arafed", "a dog"], "text_origin": ["given", "blip:large"]},
        {"file_name": "b.png", "text": ["a cat"], "text_origin": ["git:base"]},
        {"file_name": "c.png", "text": ["a", "cow"], "text_origin": ["of another number"]},
    ])  # fmt: skip
    new = tmp_path / "new/train/metadata.jsonl"
    rewrite(args(tmp_path / "dogs", drop=["arafed"]), print)
    assert [(row["text"], row["text_origin"]) for row in lines(new)] == [
        (["a dog"], ["blip:large"]), (["a cat"], ["git:base"]), (["a", "cow"], None),
    ]  # fmt: skip
    first = args(tmp_path / "dogs", first=True)
    first.output = str(tmp_path / "first")
    rewrite(first, print)
    assert [(row["text"], row["text_origin"]) for row in lines(tmp_path / "first/train/metadata.jsonl")] == [
        ("arafed", "given"), ("a cat", "git:base"), ("a", None),
    ]  # fmt: skip


def test_what_is_no_text_is_copied_as_it_is(tmp_path):
    write(tmp_path / "dogs", [{"file_name": "a.png", "text": "a dog", "by": "half \ud83d"}])
    rewrite(args(tmp_path / "dogs", prefix="sks"), print)
    assert lines(tmp_path / "new/train/metadata.jsonl")[0]["by"] == "half \ud83d"


def test_an_error_of_the_disk_is_named_and_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(DatasetError, match=r"new is not written: .*No space left"),
        new_folder(tmp_path / "new") as new,
    ):
        (new / "half.png").touch()
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("dogs/new", "lie inside one another"),
        ("dogs", "lie inside one another"),
        (".", "lie inside one another"),
        ("full", "already there"),
        ("full/x.txt", "already there"),
    ],
)
def test_an_output_that_is_in_the_way_is_named(dataset, output, named):
    (dataset.parent / "full").mkdir()
    (dataset.parent / "full/x.txt").touch()
    _, problems = read(CopyArgs, "", [str(dataset), "--output", str(dataset.parent / output)])
    assert len(problems) == 1 and named in problems[0]
