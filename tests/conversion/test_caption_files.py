"""prepare_dataset.py captions: what each flag does to a caption, and what a changed copy of a dataset holds."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from datasets import load_dataset
from PIL import Image

from finetuning.cli import read
from finetuning.conversion.caption_files import RewriteArgs, rewrite, rewritten
from finetuning.conversion.copying import CopyArgs, new_folder
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.reading import read_folder


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


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({"prefix": "photo,"}, "a dog", "photo, a dog"),
        ({"suffix": "in the sun"}, "a dog", "a dog in the sun"),
        ({"suffix": ", high quality"}, "a dog", "a dog, high quality"),
        ({"keyword": ["interior design"]}, "a sofa", "interior design, a sofa"),
        ({"keyword": ["interior design"]}, "An Interior  design", "An Interior  design"),
        ({"keyword": ["cat"]}, "a category", "cat, a category"),
        ({"keyword": ["interior design", "sofa"]}, "a sofa", "interior design, a sofa"),
        ({"keyword": ["interior design", "living room"]}, "a sofa", "interior design, living room, a sofa"),
        ({"replace": ["cat", "dog"]}, "a Cat in a category of cats", "a dog in a category of cats"),
        ({"replace": ["a", "one", "one dog", "it"]}, "a dog", "it"),  # one pair after the other
        ({"replace": [", ", " and "]}, "a dog , a cat", "a dog and a cat"),
        ({"replace": ["dog", r"\1 \g<0>"]}, "a dog", r"a \1 \g<0>"),
        ({"replace": ["very", ""]}, "a very big dog", "a big dog"),
        ({"template": "a photo of {caption} in {place}"}, "a dog", "a photo of a dog in {place}"),
        ({"template": "{caption}, {caption}"}, "a {caption}", "a {caption}, a {caption}"),
        ({"drop": ["arafed"]}, "Arafed dog, ARAFED, big", "dog, big"),
        ({"drop": ["there is", "a c++"]}, "there  is a cat and A C++ book", "a cat and book"),
        ({"drop": ["art"]}, "a party", "a party"),
        ({"drop_regex": [r"\(.*?\)", "^A "]}, "A dog (big) (old), a cat", "dog, a cat"),
        ({"drop_regex": ["DOG"]}, "a dog", "a dog"),
        ({"drop": ["cat"]}, "a dog  , big", "a dog  , big"),  # nothing to take out: nothing is tidied
        ({"drop": ["dog"]}, "dog", ""),
        ({"drop": ["dog"], "prefix": "photo", "keyword": ["sks"], "suffix": "!", "template": "x {caption}"}, "dog", ""),
        ({"prefix": "photo", "only": "^a dog"}, "a cat and a dog", "a cat and a dog"),
        ({"prefix": "photo", "only": "^a dog"}, "a dog", "photo a dog"),
    ],
)  # fmt: skip
def test_a_caption_is_rewritten(flags, before, after):
    assert rewritten(before, RewriteArgs(**flags)) == after


def test_changes_are_made_in_the_stated_order():
    flags = RewriteArgs(
        drop=["arafed"],
        replace=["dog", "cat"],
        template="photo of {caption}",
        keyword=["dog"],
        prefix="sks,",
        suffix="!",
    )
    assert rewritten("arafed dog", flags) == "sks, dog, photo of cat!"


def test_copy_has_the_same_files_and_new_captions(dataset, lines):
    source = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    said = []
    assert rewrite(args(dataset, drop=["arafed"]), said.append) == 3
    new = dataset.parent / "new"
    assert lines(new / "train/metadata.jsonl") == [
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "b.png", "text": "dog on a sofa"},
        {"file_name": "more/a.png", "text": "a cat"},
    ]
    assert lines(new / "validation/metadata.jsonl") == [{"file_name": "a.png", "text": "an bird"}]
    for name in ("train/a.png", "train/b.png", "train/more/a.png", "validation/a.png"):
        assert os.path.samefile(new / name, dataset / name)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == source
    assert sorted(path.name for path in dataset.parent.iterdir()) == ["dogs", "new"]
    assert "3 of 4 captions changed" in said[0]
    assert said[1] == "  - a cat, arafed\n  + a cat" or said[1] == "  - arafed dog on a sofa\n  + dog on a sofa"
    assert len(said) == 4


def test_training_and_hugging_face_datasets_read_the_copy(dataset):
    rewrite(args(dataset, prefix="sks"), print)
    findings = Findings()
    rows = read_folder(dataset.parent / "new", "train", "image", "text", False, findings)
    assert [row.captions for row in rows] == [("sks a cat",), ("sks arafed dog on a sofa",), ("sks a cat, arafed",)]
    assert findings.report() == ""
    loaded = load_dataset("imagefolder", data_dir=str(dataset.parent / "new"), cache_dir=str(dataset.parent / "cache"))
    assert loaded["train"]["text"] == [row.captions[0] for row in rows]
    assert len(loaded["validation"]) == 1


def test_dry_run_says_all_and_writes_nothing(dataset):
    before, said = sorted(dataset.parent.rglob("*")), []
    flags = RewriteArgs(path=str(dataset), drop=["arafed"], dry_run=True)
    assert rewrite(flags, said.append) == 3
    assert "3 of 4 captions would change" in said[0] and len(said) == 4
    assert sorted(dataset.parent.rglob("*")) == before


def test_several_captions_are_all_rewritten_and_all_rows_become_lists(tmp_path, lines):
    rows = [{"file_name": "a.png", "text": ["a dog", "arafed"]}, {"file_name": "b.png", "text": ["cat", "a cat"]}]
    write(tmp_path / "dogs", rows)
    said = []
    rewrite(args(tmp_path / "dogs", drop=["arafed"], prefix="sks"), said.append)
    assert [row["text"] for row in lines(tmp_path / "new/train/metadata.jsonl")] == [
        ["sks a dog"],
        ["sks cat", "sks a cat"],
    ]
    assert "nothing is left (1): metadata.jsonl line 1" in said[0]


def test_first_keeps_the_first_and_says_so(tmp_path, lines):
    write(
        tmp_path / "dogs", [{"file_name": "a.png", "text": ["a dog", "b"]}, {"file_name": "b.png", "text": ["a cat"]}]
    )
    said = []
    assert rewrite(args(tmp_path / "dogs", first=True), said.append) == 0
    assert [row["text"] for row in lines(tmp_path / "new/train/metadata.jsonl")] == ["a dog", "a cat"]
    assert "the first caption is kept (1): metadata.jsonl line 1" in said[0]


def test_a_row_without_any_caption_left_is_refused_or_left_out(dataset, lines):
    flags = {"drop_regex": ["^arafed dog.*"]}
    with pytest.raises(DatasetError, match=r"1 error:\n.*train/metadata.jsonl line 1"):
        rewrite(args(dataset, **flags), print)
    assert not (dataset.parent / "new").exists()
    rewrite(args(dataset, on_bad_rows="skip", **flags), print)
    assert [row["file_name"] for row in lines(dataset.parent / "new/train/metadata.jsonl")] == ["a.png", "more/a.png"]
    assert not (dataset.parent / "new/train/b.png").exists()


def test_nothing_left_to_train_on_is_refused(dataset):
    with pytest.raises(DatasetError, match="no row is left to train on"):
        rewrite(args(dataset, drop_regex=[".*"], on_bad_rows="skip"), print)
    assert not (dataset.parent / "new").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--output", "{tmp}/new"], ["say what to do"]),
        (["--prefix", "x"], ["--output is required"]),
        (["--output", "{tmp}/new", "--replace", "a", "b", "c"], ["'c' has no second half"]),
        (["--output", "{tmp}/new", "--template", "a photo"], ["has no {caption}"]),
        (["--output", "{tmp}/new", "--drop_regex", "(", "--only", "["], ["--drop_regex '('", "--only '['"]),
        (["--output", "{tmp}/new", "--drop", " "], ["--drop has an empty word"]),
        (["--output", "{tmp}/new", "--replace", "", "b"], ["--replace has an empty word"]),
        (["--output", "{tmp}/new", "--prefix", "x", "--caption_column", "none"], ["leaves no captions"]),
    ],
)
def test_bad_flags_are_named(dataset, flags, named):
    flags = [flag.replace("{tmp}", str(dataset.parent)) for flag in flags]
    _, problems = read(RewriteArgs, "", [str(dataset), *flags])
    assert len(problems) == len(named)
    for problem, name in zip(sorted(problems), sorted(named), strict=True):
        assert name in problem


# What every changed copy of a dataset has in common (copying.py)


def test_all_splits_go_by_their_usual_names(tmp_path, lines):
    for name in ("training", "dev", "test"):
        write(tmp_path / "dogs" / name, [{"file_name": "a.png", "text": name}])
    rewrite(args(tmp_path / "dogs", prefix="sks"), print)
    found = {path.parent.name: lines(path)[0]["text"] for path in (tmp_path / "new").rglob("metadata.jsonl")}
    assert found == {"train": "sks training", "validation": "sks dev", "test": "sks test"}


def test_other_columns_and_the_caption_columns_name_are_kept(tmp_path, lines):
    write(tmp_path / "dogs", [
        {"file_name": "a.png", "prompt": "a dog", "text": "other", "origin": {"by": "blip", "n": 1}},
        {"file_name": "b.png", "prompt": "a cat"},
    ])  # fmt: skip
    rewrite(args(tmp_path / "dogs", prefix="sks", caption_column="prompt"), print)
    assert lines(tmp_path / "new/train/metadata.jsonl") == [
        {"file_name": "a.png", "prompt": "sks a dog", "text": "other", "origin": {"by": "blip", "n": 1}},
        {"file_name": "b.png", "prompt": "sks a cat"},
    ]


def test_parquet_metadata_is_read_and_its_dates_become_text(tmp_path, lines):
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


def test_images_from_outside_with_one_name_are_kept_apart(tmp_path, lines):
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


def test_origins_of_captions_go_with_them(tmp_path, lines):
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


def test_an_error_of_the_disk_is_named_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(DatasetError, match=r"new is not written: .*No space left"), new_folder(tmp_path / "new") as new:
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
