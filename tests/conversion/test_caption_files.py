"""prepare_dataset.py captions: what each flag does to a caption, and what the copy holds."""

import json
import os

import pytest
from datasets import load_dataset
from PIL import Image

from finetuning.cli import read
from finetuning.conversion.caption_files import RewriteArgs, rewrite, rewritten
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.reading import read_folder


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


def test_copy_has_the_same_files_and_new_captions(dataset):
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


def test_three_examples_are_shown(tmp_path):
    write(tmp_path / "dogs", [{"file_name": f"{n}.png", "text": f"dog {n}"} for n in range(9)])
    said = []
    rewrite(args(tmp_path / "dogs", prefix="sks"), said.append)
    assert said[1:] == [f"  - dog {n}\n  + sks dog {n}" for n in range(3)]


def test_several_captions_are_all_rewritten_and_all_rows_become_lists(tmp_path):
    rows = [{"file_name": "a.png", "text": ["a dog", "arafed"]}, {"file_name": "b.png", "text": ["cat", "a cat"]}]
    write(tmp_path / "dogs", rows)
    said = []
    rewrite(args(tmp_path / "dogs", drop=["arafed"], prefix="sks"), said.append)
    assert [row["text"] for row in lines(tmp_path / "new/train/metadata.jsonl")] == [
        ["sks a dog"],
        ["sks cat", "sks a cat"],
    ]
    assert "nothing is left (1): metadata.jsonl line 1" in said[0]


def test_first_keeps_the_first_and_says_so(tmp_path):
    write(
        tmp_path / "dogs", [{"file_name": "a.png", "text": ["a dog", "b"]}, {"file_name": "b.png", "text": ["a cat"]}]
    )
    said = []
    assert rewrite(args(tmp_path / "dogs", first=True), said.append) == 0
    assert [row["text"] for row in lines(tmp_path / "new/train/metadata.jsonl")] == ["a dog", "a cat"]
    assert "the first caption is kept (1): metadata.jsonl line 1" in said[0]


def test_a_row_without_any_caption_left_is_refused_or_left_out(dataset):
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
