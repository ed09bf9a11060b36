"""The layouts and faults that people's image folders really have."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from PIL import Image

from finetuning.data.findings import PROBLEMS, DatasetError, Findings
from finetuning.data.reading import metadata_files, read_folder, read_hub

ROOT = Path(__file__).resolve().parents[2]


def images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def jsonl(path, *records):
    """Metadata from pairs (file name, caption) or whole records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [one if isinstance(one, dict) else {"file_name": one[0], "text": one[1]} for one in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@dataclass
class Reading:
    rows: list | None
    findings: Findings
    root: Path

    @property
    def captions(self):
        """{image relative to the root: its captions}."""
        return {os.path.relpath(row.image, self.root): row.captions for row in self.rows}

    @property
    def errors(self):
        """{code: [where (reason), ...]}."""
        return self.findings.as_dict()["errors"]

    @property
    def warnings(self):
        return self.findings.as_dict()["warnings"]


def read(root, split="train", image_column="image", caption_column="text", allow_outside_paths=False):
    findings = Findings()
    return Reading(
        read_folder(root, split, image_column, caption_column, allow_outside_paths, findings), findings, root
    )


def clean(root, **options):
    """The captions of a folder in which nothing is wrong and nothing needs saying."""
    reading = read(root, **options)
    assert (reading.errors, reading.warnings) == ({}, {})
    return reading.captions


TWO = {"a.png": ("a cat",), "b.png": ("ein Hündchen",)}


@pytest.fixture
def two(tmp_path):
    """A folder with the images a.png and b.png, still without metadata."""
    images(tmp_path, "a.png", "b.png")
    return tmp_path


# Formats of the metadata


def test_jsonl(two):
    jsonl(two / "metadata.jsonl", ("b.png", "ein Hündchen"), ("a.png", "a cat"))
    reading = read(two)
    assert reading.captions == TWO
    assert list(reading.captions) == ["a.png", "b.png"]  # by path, not as the file has them
    assert [row.origin for row in reading.rows] == ["metadata.jsonl line 2", "metadata.jsonl line 1"]


def test_csv(two):
    (two / "metadata.csv").write_text("file_name,text\na.png,a cat\nb.png,ein Hündchen\n", encoding="utf-8")
    assert clean(two) == TWO


def test_csv_keeps_numbers_na_quotes_and_line_ends_inside_captions(tmp_path):
    captions = ["12", "NA", 'a "big" cat, asleep', "one\ntwo", "split\u2028here"]
    images(tmp_path, *(f"{i}.png" for i in range(5)))
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{i}.png", text) for i, text in enumerate(captions))])
    assert clean(tmp_path) == {f"{i}.png": (text,) for i, text in enumerate(captions)}


def test_parquet(two):
    table = pyarrow.table({"file_name": ["a.png", "b.png"], "text": ["a cat", "ein Hündchen"]})
    pyarrow.parquet.write_table(table, two / "metadata.parquet")
    assert clean(two) == TWO


def test_metadata_that_cannot_be_read_is_named(two, monkeypatch):
    (two / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DatasetError, match=r"metadata\.parquet"):
        read(two)
    (two / "metadata.parquet").unlink()
    jsonl(two / "metadata.jsonl", ("a.png", "a cat"))

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(DatasetError, match=r"metadata\.jsonl .*Permission denied"):
        read(two)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_git_lfs_pointer_in_place_of_metadata_says_git_lfs(two, name):
    (two / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DatasetError, match=rf"{name}.*git lfs pull"):
        read(two)


# Where images and metadata stand


def test_metadata_in_the_root_above_train(tmp_path):
    """Seed 003: metadata.jsonl beside train/, the images in train/living_room/."""
    images(tmp_path, "train/living_room/1.jpg", "train/living_room/2.jpg", "train/living_room/3.jpg")
    jsonl(
        tmp_path / "metadata.jsonl",
        ("train/living_room/1.jpg", "from the root"),
        ("living_room/2.jpg", "from train"),
        ("./train/living_room/3.jpg", "with a dot"),
    )
    assert clean(tmp_path) == {
        "train/living_room/1.jpg": ("from the root",),
        "train/living_room/2.jpg": ("from train",),
        "train/living_room/3.jpg": ("with a dot",),
    }


def test_images_in_the_root_beside_test_train_without_it(tmp_path):
    images(tmp_path, "1.png", "test/2.png")
    jsonl(tmp_path / "metadata.jsonl", ("1.png", "mine"), ("test/2.png", "kept for later"))
    assert clean(tmp_path) == {"1.png": ("mine",)}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "eval", "dev", "Validation", "VAL"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_splits_are_found_under_their_usual_names_in_any_case(tmp_path, train, name):
    for split in (train, name):
        images(tmp_path / split, "1.png")
        jsonl(tmp_path / split / "metadata.jsonl", ("1.png", split))
    assert clean(tmp_path, split="validation") == {f"{name}/1.png": (name,)}
    assert clean(tmp_path) == {f"{train}/1.png": (train,)}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(("one", "other"), [("train", "training"), ("val", "valid"), ("Test", "test")])
def test_two_folders_with_images_for_one_split_are_an_error_that_names_both(tmp_path, split, one, other):
    for folder in ("train", one, other):
        images(tmp_path / folder, "1.png")
        jsonl(tmp_path / folder / "metadata.jsonl", ("1.png", folder))
    with pytest.raises(DatasetError, match=f"{min(one, other)}/ and {max(one, other)}/"):
        read(tmp_path, split)


def test_a_second_folder_without_images_is_no_second_split(tmp_path):
    images(tmp_path, "train/1.png")
    (tmp_path / "training/logs").mkdir(parents=True)
    jsonl(tmp_path / "train/metadata.jsonl", ("1.png", "one"))
    assert clean(tmp_path) == {"train/1.png": ("one",)}


@pytest.mark.parametrize(
    "names", [("train/1.png", "validation/2.png"), ("1.png", "2.png"), ("/gone/1.png", "/gone/2.png")]
)
def test_one_metadata_file_in_the_root_serves_every_split(tmp_path, names):
    images(tmp_path, "train/1.png", "validation/2.png")
    jsonl(tmp_path / "metadata.jsonl", (names[0], "one"), (names[1], "two"))
    train, validation = read(tmp_path), read(tmp_path, "validation")
    assert (train.captions, train.errors) == ({"train/1.png": ("one",)}, {})
    assert (validation.captions, validation.errors) == ({"validation/2.png": ("two",)}, {})
    assert metadata_files(tmp_path) == [tmp_path / "metadata.jsonl"]


def test_a_splits_own_metadata_does_not_mean_the_images_of_another_split(tmp_path):
    images(tmp_path, "train/1.png", "validation/2.png")
    jsonl(tmp_path / "train/metadata.jsonl", ("1.png", "one"), ("2.png", "lost?"))
    assert read(tmp_path).errors == {"image_missing": ["train/metadata.jsonl line 2 (2.png)"]}


def test_an_error_in_the_roots_metadata_is_counted_once_over_the_splits(tmp_path):
    images(tmp_path, "train/1.png", "validation/2.png")
    jsonl(tmp_path / "metadata.jsonl", ("train/1.png", "one"), ("validation/2.png", "two"), ("train/gone.png", "three"))
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("{broken\n")
    findings = Findings()
    for split in ("train", "validation"):
        read_folder(tmp_path, split, "image", "text", False, findings)
    assert sorted(len(found) for found in findings.errors.values() if found) == [1, 1]


def test_row_for_an_image_outside_every_split_is_an_error(tmp_path):
    images(tmp_path, "train/1.png", "extra/2.png")
    jsonl(tmp_path / "metadata.jsonl", ("train/1.png", "one"), ("extra/2.png", "two"))
    reading = read(tmp_path)
    assert reading.captions == {"train/1.png": ("one",)}
    assert reading.errors == {"hidden": ["metadata.jsonl line 2 (extra/2.png)"]}


def test_metadata_in_sub_folders(tmp_path):
    images(tmp_path, "train/x/1.png", "train/y/1.png")
    jsonl(tmp_path / "train/x/metadata.jsonl", ("1.png", "in x"))
    (tmp_path / "train/y/metadata.csv").write_text("text,file_name\nin y,1.png\n")
    assert clean(tmp_path) == {"train/x/1.png": ("in x",), "train/y/1.png": ("in y",)}


def test_flat_folder_with_test_in_a_file_name_keeps_every_row(tmp_path):
    names = ["my_test_room.jpg", "1.jpg", "train_station.jpg"]
    images(tmp_path, *names)
    jsonl(tmp_path / "metadata.jsonl", *((name, "a room") for name in names))
    assert sorted(clean(tmp_path)) == sorted(names)


def test_folder_named_relative_to_the_working_directory(two, monkeypatch):
    jsonl(two / "metadata.jsonl", ("a.png", "a cat"), (str(two / "b.png"), "ein Hündchen"))
    monkeypatch.chdir(two)
    assert clean(Path(".")) == TWO
    monkeypatch.chdir(two.parent)
    assert [row.captions for row in read(Path(two.name)).rows] == [("a cat",), ("ein Hündchen",)]
    assert read(Path(two.name)).errors == {}


# Absolute names and names that reach outside


@pytest.mark.parametrize("folder", ["/home/ubuntu/projects/finetune-sd/images/", "D:\\photos\\", "D:/photos/"])
def test_absolute_name_of_another_machine_is_the_image_of_that_name(tmp_path, folder):
    """Seed 004: metadata.jsonl above train/, written with the paths of the machine that made it."""
    images(tmp_path / "train", "iibjsy2QFEE.jpg", "okb9GB_O6w0.jpg")
    jsonl(tmp_path / "metadata.jsonl", (f"{folder}iibjsy2QFEE.jpg", "a flower"), ("train/okb9GB_O6w0.jpg", "a cat"))
    reading = read(tmp_path)
    assert reading.captions == {"train/iibjsy2QFEE.jpg": ("a flower",), "train/okb9GB_O6w0.jpg": ("a cat",)}
    assert reading.errors == {} and reading.warnings == {"moved": [f"{folder}iibjsy2QFEE.jpg"]}


def test_absolute_name_of_another_machine_that_fits_two_images_is_not_guessed(tmp_path):
    images(tmp_path, "x/1.png", "y/1.png")
    jsonl(tmp_path / "metadata.jsonl", ("/gone/1.png", "which?"), ("x/1.png", "x"), ("y/1.png", "y"))
    reading = read(tmp_path)
    assert reading.captions == {"x/1.png": ("x",), "y/1.png": ("y",)}
    assert reading.errors == {"ambiguous_name": ["metadata.jsonl line 1 (/gone/1.png)"]}


def test_same_names_in_two_splits_are_told_apart_by_where_the_metadata_stands(tmp_path):
    for split in ("train", "validation"):
        images(tmp_path / split, "00000.png")
        jsonl(tmp_path / split / "metadata.jsonl", (f"/gone/{split}/00000.png", split))
    assert read(tmp_path).captions == {"train/00000.png": ("train",)}
    assert read(tmp_path, "validation").captions == {"validation/00000.png": ("validation",)}


@pytest.mark.parametrize(
    ("name", "link", "target"),
    [
        ("{tmp}/secret/s.png", None, None),
        ("../secret/s.png", None, None),
        ("s.png", "s.png", "secret/s.png"),
        ("linked/s.png", "linked", "secret"),
    ],
)
def test_a_row_that_reaches_outside_is_refused_unless_a_flag_permits_it(tmp_path, name, link, target):
    images(tmp_path, "data/a.png", "secret/s.png")
    root, name = tmp_path / "data", name.format(tmp=tmp_path)
    if link:
        (root / link).symlink_to(tmp_path / target)
    jsonl(root / "metadata.jsonl", ("a.png", "a cat"), (name, "a secret"))
    refused, allowed = read(root), read(root, allow_outside_paths=True)
    assert refused.captions == {"a.png": ("a cat",)}
    assert refused.errors["outside"] == [f"metadata.jsonl line 2 ({name})"]
    assert allowed.errors == {} and sorted(allowed.captions.values()) == [("a cat",), ("a secret",)]


@pytest.mark.parametrize("target", ["s.png", "."])
def test_links_reach_outside_without_captions_only_when_permitted(tmp_path, target):
    images(tmp_path, "data/a.png", "secret/s.png")
    (tmp_path / "data" / ("s.png" if target != "." else "linked")).symlink_to(tmp_path / "secret" / target)
    refused = read(tmp_path / "data", caption_column="none")
    assert refused.captions == {"a.png": ("",)}
    assert "outside" in refused.errors
    assert len(clean(tmp_path / "data", caption_column="none", allow_outside_paths=True)) == 2


# Rows and images that do not match


@pytest.mark.parametrize(
    ("file", "name", "hint"),
    [
        ("images/x.png", "images\\x.png", "images/x.png is there; write / in place of \\"),
        ("caf\u00e9.png", "cafe\u0301.png", "caf\u00e9.png is there; the two are written in different Unicode forms"),
        ("my cat.png", "my%20cat.png", "my cat.png is there; write the name as it is"),
        ("x.png", " x.png ", "x.png is there; there are spaces around the name"),
        ("X.JPG", "x.jpg", "X.JPG is there; small and capital letters differ"),
        ("x.png", "set/x.png", "x.png is there; names count from the folder of the metadata"),
        ("train/x.png", "train/train/x.png", "train/x.png is there; names count from the folder of the metadata"),
    ],
)
def test_a_name_that_is_nearly_right_gets_a_hint(tmp_path, file, name, hint):
    images(tmp_path / "set", file, "sound.png" if "/" not in file else f"{file.split('/')[0]}/sound.png")
    jsonl(tmp_path / "set/metadata.jsonl", (name, "a cat"))
    (found,) = read(tmp_path / "set").errors["image_missing"]
    assert hint in found


def test_links_that_lead_nowhere_are_named(two):
    (two / "dead.png").symlink_to("nowhere.png")
    (two / "gone.png").symlink_to("nowhere.png")
    jsonl(two / "metadata.jsonl", ("a.png", "a cat"), ("b.png", "a dog"), ("gone.png", "a bird"))
    assert read(two).errors == {"dead_link": ["metadata.jsonl line 3 (gone.png)", "dead.png"]}
    assert read(two, caption_column="none").errors == {"dead_link": ["dead.png", "gone.png"]}


def test_list_of_captions_keeps_all_that_say_something(two):
    jsonl(two / "metadata.jsonl", ("a.png", ["a cat ", "", "a pet"]), ("b.png", "a dog"))
    assert clean(two) == {"a.png": ("a cat", "a pet"), "b.png": ("a dog",)}


def test_several_rows_for_one_image_are_all_kept_and_noted(two):
    jsonl(two / "metadata.jsonl", ("a.png", "a cat"), ("b.png", "a dog"), ("./a.png", "a pet"))
    reading = read(two)
    assert [row.captions for row in reading.rows] == [("a cat",), ("a pet",), ("a dog",)]
    assert reading.errors == {}
    assert reading.warnings == {"named_twice": ["a.png"]}


# Columns


def test_other_columns_can_be_named(two):
    jsonl(two / "metadata.jsonl", {"photo": "a.png", "alt": "a cat"}, {"photo": "b.png", "alt": "ein Hündchen"})
    assert clean(two, image_column="photo", caption_column="alt") == TWO


def test_image_file_name_is_taken_as_the_image(two):
    jsonl(two / "metadata.jsonl", *({"image_file_name": name, "text": text[0]} for name, text in TWO.items()))
    assert clean(two) == TWO


@pytest.mark.parametrize("name", ["metadata.json", "Metadata.jsonl", "metadata.jsonl.txt", "metadata (1).csv"])
def test_a_metadata_file_under_another_name_is_named(two, name):
    (two / name).write_text("")
    with pytest.raises(DatasetError, match=rf"no metadata\.jsonl .*; {re.escape(name)} is there: rename it"):
        read(two)


def test_images_in_the_validation_folder_alone_are_explained(two):
    (two / "Val").mkdir()
    for name in TWO:
        (two / name).rename(two / "Val" / name)
    with pytest.raises(DatasetError, match=r"no images in .*it has Val/ alone"):
        read(two)


def test_a_list_in_place_of_lines_is_explained(two):
    (two / "metadata.jsonl").write_text(json.dumps([{"file_name": "a.png", "text": "a cat"}], indent=1))
    with pytest.raises(DatasetError, match=r"metadata\.jsonl is one JSON list"):
        read(two)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_with_other_separators_is_explained(two, separator):
    (two / "metadata.csv").write_text(f"file_name{separator}text\na.png{separator}a cat, asleep\n")
    with pytest.raises(DatasetError, match=r"metadata\.csv has one column, .*separated by commas"):
        read(two)


def test_csv_without_a_header_is_explained_even_with_rows_of_other_lengths(two):
    (two / "metadata.csv").write_text("a.png,a cat\nb.png,a dog, asleep\nb.png,a dog\n")
    with pytest.raises(DatasetError, match=r'it has a\.png, a cat, and "file_name" is needed'):
        read(two)


def test_caption_column_none_reads_images_alone(two):
    assert clean(two, caption_column="none") == {"a.png": ("",), "b.png": ("",)}
    (two / "metadata.jsonl").write_text("not even JSON\n")
    assert clean(two, caption_column="none") == {"a.png": ("",), "b.png": ("",)}


# Nothing to read


def test_no_metadata_says_what_to_write_and_counts_the_caption_files(two):
    with pytest.raises(DatasetError, match=r"2 images but no metadata\.jsonl.*--caption_column none"):
        read(two)
    (two / "a.txt").write_text("a cat")
    with pytest.raises(DatasetError, match="1 caption file"):
        read(two)


@pytest.mark.parametrize(("name", "advice"), [("shard.tar", "--streaming"), ("set.zip", "unpack")])
def test_what_a_folder_holds_in_place_of_images_is_named(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=rf"{name}.*{advice}"):
        read(tmp_path)
    with pytest.raises(DatasetError, match="unpack" if name == "set.zip" else "name a folder"):
        read(tmp_path / name)


def test_empty_folder(tmp_path):
    with pytest.raises(DatasetError, match="there are no images in") as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


# The whole


def test_order_does_not_depend_on_the_hash_seed(tmp_path, root):
    for folder in "edcba":
        images(tmp_path / folder, "2.png", "1.png")
        jsonl(tmp_path / folder / "metadata.jsonl", ("1.png", f"{folder}1"), ("2.png", f"{folder}2"), ("1.png", "more"))
    program = (
        "import sys; from finetuning.data.reading import *\n"
        "for row in read_folder(sys.argv[1], 'train', 'image', 'text', False, Findings()): print(row)"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], cwd=root, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    assert printed[0].count("\n") == 15
    assert printed[0] == printed[1] == printed[2]


def test_the_report_counts_and_shows_the_first_examples():
    findings = Findings()
    for number in range(1, 9):
        findings.error("image_missing", f"line {number}")
    findings.warn("cut_caption", "a.png", "90 tokens", limit=77)
    findings.warn("a kind of one's own", "b.png")
    first, second, third = findings.report(shown=2).splitlines()
    assert first.startswith("  error: ") and "(8): line 1; line 2; and 6 more" in first
    assert second.startswith("  warning: ") and "77" in second and "a.png (90 tokens)" in second
    assert "a kind of one's own (1): b.png" in third
    assert findings.count() == 8
    assert list(findings.as_dict()["errors"]) == ["image_missing"]


def test_every_code_has_a_sentence_that_can_be_filled_in():
    """Each code that the package uses stands in the table, and none stands there for nothing."""
    used = set()
    for path in ROOT.glob("finetuning/**/*.py"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:\.error|\.warn)\(\s*"(\w+)"', text))
    assert used <= PROBLEMS.keys(), used - PROBLEMS.keys()


# Datasets of the Hub


def hub(columns, image_column="image", caption_column="text"):
    findings = Findings()
    return read_hub(Dataset.from_dict(columns), image_column, caption_column, findings), findings


def photos(count):
    return [Image.new("RGB", (2, 2)) for _ in range(count)]


def test_hub_text_in_the_image_column_is_not_opened_as_a_path():
    with pytest.raises(DatasetError, match=r"the column image holds Value, not images: .* --image_column"):
        hub({"image": ["/somewhere/secret.png"], "text": ["a cat"]})


def test_hub_without_captions():
    rows, _ = hub({"image": photos(2)}, caption_column="none")
    assert [(row.image, row.captions) for row in rows] == [(0, ("",)), (1, ("",))]


def test_splits_below_another_folder_are_not_trained_on_together(tmp_path):
    images(tmp_path, "images/train/1.png", "images/test/2.png")
    jsonl(tmp_path / "metadata.jsonl", ("images/train/1.png", "a"), ("images/test/2.png", "b"))
    with pytest.raises(DatasetError, match=r"images/test looks like a split .* name the folder .*, .*images, or"):
        read(tmp_path)


def test_images_beside_train_are_named(tmp_path):
    images(tmp_path, "train/a.png", "b.png", "more/c.png", "test/d.png", ".hidden/e.png")
    jsonl(tmp_path / "train/metadata.jsonl", ("a.png", "a cat"))
    reading = read(tmp_path)
    assert reading.captions == {"train/a.png": ("a cat",)} and not reading.errors
    assert reading.warnings == {"beside_train": ["b.png", "more/c.png"]}


def test_links_that_lead_in_a_circle_end(tmp_path):
    images(tmp_path, "a.png", "more/b.png")
    (tmp_path / "more/again").symlink_to(tmp_path, target_is_directory=True)
    jsonl(tmp_path / "metadata.jsonl", ("a.png", "a cat"), ("more/b.png", "a dog"))
    assert clean(tmp_path) == {"a.png": ("a cat",), "more/b.png": ("a dog",)}


def test_a_folder_that_cannot_be_read_is_named(two, monkeypatch):
    def forbidden(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DatasetError, match=f"{two.name} cannot be read: .*Permission denied"):
        read(two)


def test_csv_caption_with_an_unquoted_comma_is_an_error_not_cut(two):
    (two / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\nb.png,a dog\n", encoding="utf-8")
    reading = read(two)
    assert reading.captions == {"b.png": ("a dog",)}
    assert reading.errors["too_many_fields"] == ["metadata.csv row 1"]


def test_absolute_name_through_a_link_to_the_folder(tmp_path):
    images(tmp_path / "real", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    jsonl(tmp_path / "real/metadata.jsonl", (str(tmp_path / "link/a.png"), "a cat"))
    assert clean(tmp_path / "real") == {"a.png": ("a cat",)}
