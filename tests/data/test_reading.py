"""The layouts and faults that people's image folders really have."""

import csv
import io
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


def jsonl(*records):
    """Metadata from pairs (file name, caption) or whole records."""
    records = [one if isinstance(one, dict) else {"file_name": one[0], "text": one[1]} for one in records]
    return "".join(json.dumps(record) + "\n" for record in records)


@dataclass
class Reading:
    rows: list | None
    errors: dict  # {code: [where (reason), ...]}
    warnings: dict
    root: Path

    @property
    def captions(self):
        """[(image relative to the root, its captions)]."""
        return [(os.path.relpath(row.image, self.root), row.captions) for row in self.rows]


def read(root, split="train", image_column="image", caption_column="text", allow_outside_paths=False):
    findings = Findings()
    rows = read_folder(root, split, image_column, caption_column, allow_outside_paths, findings)
    return Reading(rows, *findings.as_dict().values(), root)


def table(columns):
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


CAT, PUPPY = ("a cat",), ("ein Hündchen",)
TWO = {"a.png": CAT, "b.png": PUPPY}
ODD = ["12", "NA", 'a "big" cat, asleep', "one\ntwo", "split\u2028here"]


def as_csv(*rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue()


LAYOUTS = {  # what: (files; images are numbers; flags of `read`, captions, errors and warnings together)
    # formats of the metadata
    "jsonl, read by path": ({"a.png": 1, "b.png": 2, "metadata.jsonl": jsonl(("b.png", *PUPPY), ("a.png", *CAT))},
                            {}, TWO, {}),
    "csv": ({"a.png": 1, "b.png": 2, "metadata.csv": "file_name,text\na.png,a cat\nb.png,ein Hündchen\n"}, {}, TWO, {}),
    "csv keeps numbers, NA, quotes and line ends inside captions": (
        {**{f"{i}.png": i for i in range(5)},
         "metadata.csv": as_csv(("file_name", "text"), *((f"{i}.png", text) for i, text in enumerate(ODD)))},
        {}, {f"{i}.png": (text,) for i, text in enumerate(ODD)}, {},
    ),
    "csv with an unquoted comma: an error, not cut": (
        {"a.png": 1, "b.png": 2, "metadata.csv": "file_name,text\na.png,a cat, asleep\nb.png,a dog\n"},
        {}, {"b.png": ("a dog",)}, {"too_many_fields": ["metadata.csv row 1"], "unnamed_image": ["a.png"]},
    ),
    "parquet": (
        {"a.png": 1, "b.png": 2, "metadata.parquet": table({"file_name": ["a.png", "b.png"], "text": CAT + PUPPY})},
        {}, TWO, {},
    ),
    "other columns": (
        {"a.png": 1, "metadata.jsonl": jsonl({"photo": "a.png", "alt": "a cat"})},
        {"image_column": "photo", "caption_column": "alt"}, {"a.png": CAT}, {},
    ),
    "image_file_name": (
        {"a.png": 1, "metadata.jsonl": jsonl({"image_file_name": "a.png", "text": "a cat"})}, {}, {"a.png": CAT}, {},
    ),
    "without captions metadata may be anything": (
        {"a.png": 1, "b.png": 2, "metadata.jsonl": "not even JSON\n"},
        {"caption_column": "none"}, {"a.png": ("",), "b.png": ("",)}, {},
    ),
    # where images and metadata stand
    "seed 003: metadata beside train/, the images below it": (
        {**{f"train/living_room/{i}.jpg": i for i in (1, 2, 3)},
         "metadata.jsonl": jsonl(("train/living_room/1.jpg", "from the root"), ("living_room/2.jpg", "from train"),
                                 ("./train/living_room/3.jpg", "with a dot"))},
        {}, {"train/living_room/1.jpg": ("from the root",), "train/living_room/2.jpg": ("from train",),
             "train/living_room/3.jpg": ("with a dot",)}, {},
    ),
    "images in the root beside test/ train without it": (
        {"1.png": 1, "test/2.png": 2, "metadata.jsonl": jsonl(("1.png", "mine"), ("test/2.png", "kept for later"))},
        {}, {"1.png": ("mine",)}, {},
    ),
    "a second folder without images is no second split": (
        {"train/1.png": 1, "training/logs/x.txt": "", "train/metadata.jsonl": jsonl(("1.png", "one"))},
        {}, {"train/1.png": ("one",)}, {},
    ),
    "a split's own metadata does not mean the images of another": (
        {"train/1.png": 1, "validation/2.png": 2, "train/metadata.jsonl": jsonl(("1.png", "one"), ("2.png", "lost?"))},
        {}, {"train/1.png": ("one",)}, {"image_missing": ["train/metadata.jsonl line 2 (2.png)"]},
    ),
    "an image outside every split": (
        {"train/1.png": 1, "x/2.png": 2, "metadata.jsonl": jsonl(("train/1.png", "one"), ("x/2.png", "two"))},
        {}, {"train/1.png": ("one",)},
        {"hidden": ["metadata.jsonl line 2 (x/2.png)"], "beside_train": ["x/2.png"]},
    ),
    "metadata in sub-folders": (
        {"train/x/1.png": 1, "train/y/1.png": 2, "train/x/metadata.jsonl": jsonl(("1.png", "in x")),
         "train/y/metadata.csv": "text,file_name\nin y,1.png\n"},
        {}, {"train/x/1.png": ("in x",), "train/y/1.png": ("in y",)}, {},
    ),
    "test in a file's name": (
        {**dict.fromkeys(("1.jpg", "my_test_room.jpg", "train_station.jpg"), 1),
         "metadata.jsonl": jsonl(*((name, "a room") for name in ("my_test_room.jpg", "1.jpg", "train_station.jpg")))},
        {}, dict.fromkeys(("1.jpg", "my_test_room.jpg", "train_station.jpg"), ("a room",)), {},
    ),
    "images beside train/": (
        {"train/a.png": 1, "b.png": 2, "more/c.png": 3, "test/d.png": 4, ".hidden/e.png": 5,
         "train/metadata.jsonl": jsonl(("a.png", *CAT))},
        {}, {"train/a.png": CAT}, {"beside_train": ["b.png", "more/c.png"]},
    ),
    # absolute names
    **{
        f"seed 004: an absolute name of another machine is the image of that name, {folder}": (
            {"train/iibj.jpg": 1, "train/okb9.jpg": 2,
             "metadata.jsonl": jsonl((f"{folder}iibj.jpg", "a flower"), ("train/okb9.jpg", *CAT))},
            {}, {"train/iibj.jpg": ("a flower",), "train/okb9.jpg": CAT}, {"moved": [f"{folder}iibj.jpg"]},
        )
        for folder in ("/home/ubuntu/projects/finetune-sd/images/", "D:\\photos\\", "D:/photos/")
    },
    "one that fits two images is not guessed": (
        {"x/1.png": 1, "y/1.png": 2, "metadata.jsonl": jsonl(("/gone/1.png", "?"), ("x/1.png", "x"), ("y/1.png", "y"))},
        {}, {"x/1.png": ("x",), "y/1.png": ("y",)}, {"ambiguous_name": ["metadata.jsonl line 1 (/gone/1.png)"]},
    ),
    # rows and captions
    "a list of captions keeps all that say something": (
        {"a.png": 1, "b.png": 2, "metadata.jsonl": jsonl(("a.png", ["a cat ", "", "a pet"]), ("b.png", "a dog"))},
        {}, {"a.png": ("a cat", "a pet"), "b.png": ("a dog",)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "flags", "captions", "findings"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_read(tmp_path, lay, files, flags, captions, findings):
    found = read(lay(tmp_path, files), **flags)
    assert found.captions == list(captions.items())
    assert found.errors | found.warnings == findings


@pytest.fixture
def two(tmp_path, lay):
    """A folder with the images a.png and b.png, still without metadata."""
    return lay(tmp_path, ["a.png", "b.png"])


def test_rows_say_where_they_stand_and_several_of_one_image_are_kept_and_noted(two, lay):
    lay(two, {"metadata.jsonl": jsonl(("b.png", "a dog"), ("a.png", "a cat"), ("./a.png", "a pet"))})
    found, file = read(two), "metadata.jsonl"
    assert [(*row.captions, row.origin) for row in found.rows] == [
        ("a cat", f"{file} line 2"), ("a pet", f"{file} line 3"), ("a dog", f"{file} line 1"),
    ]  # fmt: skip
    assert (found.errors, found.warnings) == ({}, {"named_twice": ["a.png"]})


@pytest.mark.parametrize("name", ["validation", "valid", "val", "eval", "dev", "Validation", "VAL"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_splits_are_found_under_their_usual_names_in_any_case(tmp_path, lay, train, name):
    for split in (train, name):
        lay(tmp_path / split, {"1.png": 1, "metadata.jsonl": jsonl(("1.png", split))})
    assert read(tmp_path, "validation").captions == [(f"{name}/1.png", (name,))]
    assert read(tmp_path).captions == [(f"{train}/1.png", (train,))]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(("one", "other"), [("train", "training"), ("val", "valid"), ("Test", "test")])
def test_two_folders_with_images_for_one_split_are_an_error_that_names_both(tmp_path, lay, split, one, other):
    for folder in ("train", one, other):
        lay(tmp_path / folder, {"1.png": 1, "metadata.jsonl": jsonl(("1.png", folder))})
    with pytest.raises(DatasetError, match=f"{min(one, other)}/ and {max(one, other)}/"):
        read(tmp_path, split)


@pytest.mark.parametrize(
    "names", [("train/1.png", "validation/2.png"), ("1.png", "2.png"), ("/gone/1.png", "/gone/2.png")]
)
def test_one_metadata_file_in_the_root_serves_every_split(tmp_path, lay, names):
    rows = jsonl((names[0], "one"), (names[1], "two"))
    lay(tmp_path, {"train/1.png": 1, "validation/2.png": 2, "metadata.jsonl": rows})
    train, validation = read(tmp_path), read(tmp_path, "validation")
    assert (train.captions, train.errors) == ([("train/1.png", ("one",))], {})
    assert (validation.captions, validation.errors) == ([("validation/2.png", ("two",))], {})
    assert metadata_files(tmp_path) == [tmp_path / "metadata.jsonl"]


def test_an_error_in_the_roots_metadata_is_counted_once_over_the_splits(tmp_path, lay):
    rows = jsonl(("train/1.png", "one"), ("validation/2.png", "two"), ("train/gone.png", "three")) + "{broken\n"
    lay(tmp_path, {"train/1.png": 1, "validation/2.png": 2, "metadata.jsonl": rows})
    findings = Findings()
    for split in ("train", "validation"):
        read_folder(tmp_path, split, "image", "text", False, findings)
    assert sorted(map(len, findings.as_dict()["errors"].values())) == [1, 1]


def test_folder_named_relative_to_the_working_directory(two, lay, monkeypatch):
    lay(two, {"metadata.jsonl": jsonl(("a.png", "a cat"), (str(two / "b.png"), "ein Hündchen"))})
    for place, name in ((two, "."), (two.parent, two.name)):
        monkeypatch.chdir(place)
        found = read(Path(name))
        assert (found.captions, found.errors, found.warnings) == (list(TWO.items()), {}, {})


def test_same_names_in_two_splits_are_told_apart_by_where_the_metadata_stands(tmp_path, lay):
    for split in ("train", "validation"):
        lay(tmp_path / split, {"00000.png": 1, "metadata.jsonl": jsonl((f"/gone/{split}/00000.png", split))})
    for split in ("train", "validation"):
        assert read(tmp_path, split).captions == [(f"{split}/00000.png", (split,))]


@pytest.mark.parametrize(
    ("name", "link", "target"),
    [
        ("{tmp}/secret/s.png", None, None),
        ("../secret/s.png", None, None),
        ("s.png", "s.png", "secret/s.png"),
        ("linked/s.png", "linked", "secret"),
    ],
)
def test_a_row_or_a_link_that_reaches_outside_is_refused_unless_a_flag_permits_it(tmp_path, lay, name, link, target):
    root, name = tmp_path / "data", name.format(tmp=tmp_path)
    lay(tmp_path, {"data/a.png": 1, "secret/s.png": 2})
    lay(root, {"metadata.jsonl": jsonl(("a.png", "a cat"), (name, "a secret"))})
    if link:
        (root / link).symlink_to(tmp_path / target)
    refused, allowed = read(root), read(root, allow_outside_paths=True)
    assert refused.captions == [("a.png", ("a cat",))]
    assert refused.errors["outside"] == [f"metadata.jsonl line 2 ({name})"]
    assert allowed.errors == {} and sorted(texts for _, texts in allowed.captions) == [("a cat",), ("a secret",)]
    if link:
        refused, allowed = (read(root, caption_column="none", allow_outside_paths=ever) for ever in (False, True))
        assert refused.captions == [("a.png", ("",))] and "outside" in refused.errors
        assert len(allowed.rows) == 2 and allowed.errors == {}


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
def test_a_name_that_is_nearly_right_gets_a_hint(tmp_path, lay, file, name, hint):
    sound = "sound.png" if "/" not in file else f"{file.split('/')[0]}/sound.png"
    lay(tmp_path / "set", {file: 1, sound: 2, "metadata.jsonl": jsonl((name, "a cat"))})
    (found,) = read(tmp_path / "set").errors["image_missing"]
    assert hint in found


def test_links_that_lead_nowhere_are_named_and_those_that_lead_in_a_circle_end(two, lay):
    for name in ("dead.png", "gone.png"):
        (two / name).symlink_to("nowhere.png")
    lay(two, {"metadata.jsonl": jsonl(("a.png", "a cat"), ("b.png", "a dog"), ("gone.png", "a bird"))})
    (two / "again").symlink_to(two, target_is_directory=True)
    found = read(two)
    assert len(found.rows) == 2 and found.errors == {"dead_link": ["metadata.jsonl line 3 (gone.png)", "dead.png"]}
    assert read(two, caption_column="none").errors == {"dead_link": ["dead.png", "gone.png"]}


def test_absolute_name_through_a_link_to_the_folder(tmp_path, lay):
    lay(tmp_path / "real", {"a.png": 1, "metadata.jsonl": jsonl((str(tmp_path / "link/a.png"), "a cat"))})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = read(tmp_path / "real")
    assert (found.captions, found.errors, found.warnings) == ([("a.png", ("a cat",))], {}, {})


# What cannot be read at all

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BOTH = {"a.png": 1, "b.png": 2}
LIST = json.dumps([{"file_name": "a.png", "text": "a cat"}], indent=1)
REFUSED = {  # what: (files, a pattern of the message)
    "broken parquet": ({**BOTH, "metadata.parquet": b"PAR1 and no more"}, r"metadata\.parquet cannot be read"),
    **{
        f"a Git LFS pointer, {name}": ({**BOTH, name: LFS}, rf"{name}.*git lfs pull")
        for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet")
    },
    "a list in place of lines": ({**BOTH, "metadata.jsonl": LIST}, r"metadata\.jsonl is one JSON list"),
    **{
        f"csv separated by {sign!r}": (
            {**BOTH, "metadata.csv": f"file_name{sign}text\na.png{sign}a cat, asleep\n"},
            r"metadata\.csv has one column, .*separated by commas",
        )
        for sign in ";\t"
    },
    "csv without a header, rows of other lengths": (
        {**BOTH, "metadata.csv": "a.png,a cat\nb.png,a dog, asleep\nb.png,a dog\n"},
        r'it has a\.png, a cat, and "file_name" is needed',
    ),
    **{
        f"metadata under another name, {name}": (
            {**BOTH, name: ""}, rf"no metadata\.jsonl .*; {re.escape(name)} is there: rename it",
        )
        for name in ("metadata.json", "Metadata.jsonl", "metadata.jsonl.txt", "metadata (1).csv")
    },
    "no metadata": (BOTH, r"2 images but no metadata\.jsonl.*--caption_column none"),
    "caption files": ({**BOTH, "a.txt": "a cat"}, "1 caption file"),
    "the validation folder alone": ({"Val/a.png": 1}, r"no images in .*it has Val/ alone"),
    "splits further below": (
        {"images/train/1.png": 1, "images/test/2.png": 2,
         "metadata.jsonl": jsonl(("images/train/1.png", "a"), ("images/test/2.png", "b"))},
        r"images/test looks like a split .* name the folder .*, .*images, or",
    ),
    "tars": ({"shard.tar": "x"}, r"shard\.tar.*--streaming"),
    "zipped": ({"set.zip": "x"}, r"set\.zip.*unpack"),
    "nothing": ({}, "there are no images in .*nothing"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, lay, files, message):
    with pytest.raises(DatasetError, match=message):
        read(lay(tmp_path / "nothing", files))


@pytest.mark.parametrize(
    ("name", "advice"), [("a.jpg", "name a folder"), ("shard.tar", "--streaming"), ("set.zip", "unpack it")]
)
def test_a_file_in_place_of_a_folder_says_what_to_name(tmp_path, lay, name, advice):
    with pytest.raises(DatasetError, match=advice):
        read(lay(tmp_path, {name: "x"}) / name)


@pytest.mark.parametrize(("call", "named"), [("builtins.open", r"metadata\.jsonl"), ("os.scandir", "{folder}")])
def test_what_may_not_be_read_is_named(two, lay, monkeypatch, call, named):
    lay(two, {"metadata.jsonl": jsonl(("a.png", "a cat"))})

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(call, forbidden)
    with pytest.raises(DatasetError, match=f"{named.format(folder=two.name)} cannot be read.*Permission denied"):
        read(two)


# The whole


def test_order_does_not_depend_on_the_hash_seed(tmp_path, lay, root):
    for folder in "edcba":
        rows = jsonl(("1.png", f"{folder}1"), ("2.png", f"{folder}2"), ("1.png", "more"))
        lay(tmp_path / folder, {"2.png": 2, "1.png": 1, "metadata.jsonl": rows})
    program = (
        "import sys; from finetuning.data.reading import *\n"
        "for row in read_folder(sys.argv[1], 'train', 'image', 'text', False, Findings()): print(row)"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], cwd=root, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )  # fmt: skip
    assert first.count("\n") == 15 and first == second


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
    assert findings.count() == 8 and list(findings.as_dict()["errors"]) == ["image_missing"]


def test_every_code_that_the_package_uses_has_a_sentence():
    used = set()
    for path in ROOT.glob("finetuning/**/*.py"):
        used |= set(re.findall(r'(?:\.error|\.warn)\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    assert used <= PROBLEMS.keys(), used - PROBLEMS.keys()


# Datasets of the Hub


def test_hub_text_in_the_image_column_is_not_opened_as_a_path():
    with pytest.raises(DatasetError, match=r"the column image holds Value, not images: .* --image_column"):
        read_hub(Dataset.from_dict({"image": ["/a/secret.png"], "text": ["a cat"]}), "image", "text", Findings())


def test_hub_without_captions():
    rows = read_hub(Dataset.from_dict({"image": [Image.new("RGB", (2, 2))] * 2}), "image", "none", Findings())
    assert [(row.image, row.captions) for row in rows] == [(0, ("",)), (1, ("",))]
