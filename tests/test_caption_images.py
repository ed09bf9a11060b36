"""caption_images.py, run as a user runs it, on every shape of folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

import caption_images
from finetuning.captioning.captioner import Captioner
from finetuning.data.findings import Findings
from finetuning.data.reading import read_folder

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def photos(tmp_path):
    """A flat folder of five images, a.png to e.png, two of them in a sub-folder."""
    return fill(tmp_path / "photos", ["a.png", "b.png", "c.png", "more/d.png", "more/e.png"])


def fill(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def caption(folder, tiny_git, *flags, status=0):
    command = [folder, "--captioner", "git", "--model", tiny_git, "--num_beams", 1, "--max_length", 8, *flags]
    assert caption_images.main([str(word) for word in command]) == status


def rows(folder):
    """{file name: row} of a metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({row["file_name"] for row in found}) == len(found)
    return {row["file_name"]: row for row in found}


def write_rows(folder, *records):
    lines = [json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def training_reads(folder, split="train"):
    """{file name: captions}, and no errors."""
    findings = Findings()
    read = read_folder(folder, split, "image", "text", False, findings)
    assert not findings.errors, findings.report()
    return {row.image.name: row.captions for row in read}


def test_a_flat_folder_becomes_a_dataset(photos, tiny_git, capsys):
    caption(photos, tiny_git, "--batch_size", 2)
    found = rows(photos)
    assert list(found) == ["a.png", "b.png", "c.png", "more/d.png", "more/e.png"]
    assert {row["text_origin"] for row in found.values()} == {"git:tiny-git"}
    assert len({row["text"] for row in found.values()}) > 1
    assert set(training_reads(photos)) == {"a.png", "b.png", "c.png", "d.png", "e.png"}
    assert not list(photos.rglob(".*"))
    assert "5 images captioned" in capsys.readouterr().out


def test_splits_have_a_metadata_file_each(tmp_path, tiny_git):
    folder = fill(tmp_path, ["train/a.png", "train/b.png", "valid/c.png", "test/d.png"])
    caption(folder, tiny_git)
    assert {split: list(rows(folder / split)) for split in ("train", "valid", "test")} == {
        "train": ["a.png", "b.png"], "valid": ["c.png"], "test": ["d.png"]
    }  # fmt: skip
    for split in ("train", "validation", "test"):
        assert all(training_reads(folder, split).values())
    loaded = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["train"]["text"]) == sorted(row["text"] for row in rows(folder / "train").values())


GIVEN = ({"file_name": "a.png", "text": "my dog", "id": 7}, {"file_name": "./b.png", "text": ["two", "words"]})


def test_a_caption_that_is_there_stays(photos, tiny_git):
    write_rows(photos, *GIVEN)
    caption(photos, tiny_git)
    found = rows(photos)
    assert found["a.png"] == {"file_name": "a.png", "text": ["my dog"], "id": 7}
    assert found["./b.png"] == GIVEN[1]
    assert found["c.png"]["text_origin"] == ["git:tiny-git"]
    before = (photos / "metadata.jsonl").read_bytes()
    caption(photos, tiny_git)
    assert (photos / "metadata.jsonl").read_bytes() == before


def test_add_keeps_captions_and_their_origins(photos, tiny_git, capsys):
    write_rows(photos, *GIVEN)
    caption(photos, tiny_git, "--add")
    found = rows(photos)
    assert found["a.png"]["text"][0] == "my dog" and len(found["a.png"]["text"]) == 2
    assert found["a.png"]["text_origin"] == ["given", "git:tiny-git"] and found["a.png"]["id"] == 7
    assert found["./b.png"]["text_origin"] == ["given", "given", "git:tiny-git"]
    before = (photos / "metadata.jsonl").read_bytes()
    capsys.readouterr()
    caption(photos, tiny_git, "--add")  # says the same again
    assert (photos / "metadata.jsonl").read_bytes() == before
    assert "0 images captioned, 5 others as they were" in capsys.readouterr().out
    caption(photos, tiny_git, "--add", "--num_beams", 2, "--prompt", "a red dog")
    assert len(rows(photos)["a.png"]["text"]) == len(rows(photos)["a.png"]["text_origin"]) == 3
    assert len(training_reads(photos)["a.png"]) == 3
    loaded = load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(photos.parent / "cache"))
    assert sorted(map(len, loaded["text"])) == sorted(len(row["text"]) for row in rows(photos).values())


def test_overwrite_replaces_and_several_rows_become_one(photos, tiny_git):
    write_rows(photos, *GIVEN, {"file_name": "a.png", "text": "once more"})
    caption(photos, tiny_git, "--overwrite")
    found = rows(photos)
    assert isinstance(found["a.png"]["text"], str) and found["a.png"]["text"] not in ("my dog", "once more")
    assert found["a.png"]["id"] == 7 and found["./b.png"]["text_origin"] == "git:tiny-git"


def test_another_caption_column_has_origins_of_its_own(photos, tiny_git):
    write_rows(photos, *GIVEN[:1])
    caption(photos, tiny_git, "--caption_column", "machine")
    assert rows(photos)["a.png"]["text"] == "my dog"
    assert rows(photos)["a.png"]["machine_origin"] == "git:tiny-git"


class Killed(BaseException):
    """What ends a process between two batches."""


@pytest.mark.parametrize("half_line", ["", '{"name": "c.png", "te', '{"name": "c.png", "text": "\u00e9'])
def test_a_killed_run_goes_on_where_it_was(photos, tiny_git, monkeypatch, tmp_path, half_line):
    shutil.copytree(photos, tmp_path / "straight")
    flags = ("--batch_size", 2, "--top_p", 0.9)
    caption(tmp_path / "straight", tiny_git, *flags, "--num_beams", 1)
    asked, real = [], Captioner.__call__

    def dies_in_the_second_batch(self, images, names):
        asked.extend(names)
        if len(asked) > 2 and not (photos / "go on").exists():
            raise Killed
        return real(self, images, names)

    monkeypatch.setattr(Captioner, "__call__", dies_in_the_second_batch)
    with pytest.raises(Killed):
        caption(photos, tiny_git, *flags)
    assert not (photos / "metadata.jsonl").exists()
    journal = photos / ".captions.jsonl"
    assert len(journal.read_text().splitlines()) == 3  # settings, two images
    journal.write_bytes(journal.read_bytes() + half_line.encode()[:-1])  # cut within a letter
    (photos / "go on").touch()
    asked.clear()
    caption(photos, tiny_git, *flags, "--batch_size", 3)
    assert asked == ["c.png", "more/d.png", "more/e.png"]
    assert rows(photos) == rows(tmp_path / "straight")
    assert not journal.exists()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "memory"),
    ],
)
def test_what_ends_a_run_is_one_clear_message(photos, tiny_git, monkeypatch, capsys, error, status, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(Captioner, "__call__", fail)
    caption(photos, tiny_git, status=status)
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_the_model_is_shown_no_more_than_max_side(tmp_path, tiny_git, monkeypatch):
    for name, size in (("a.png", (100, 50)), ("b.png", (20, 40)), ("c.png", (30, 10))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "photos" / name)
    shown = []
    monkeypatch.setattr(Captioner, "__call__", lambda _, images, names: shown.extend(images) or names)
    caption(tmp_path / "photos", tiny_git, "--max_side", 30)
    assert [image.size for image in shown] == [(30, 15), (15, 30), (30, 10)]


def test_an_interrupted_run_is_not_mixed_with_another(photos, tiny_git, monkeypatch, capsys):
    real = Captioner.__call__

    def dies_at_b(self, images, names):
        if names == ["b.png"]:
            raise Killed
        return real(self, images, names)

    monkeypatch.setattr(Captioner, "__call__", dies_at_b)
    with pytest.raises(Killed):
        caption(photos, tiny_git, "--batch_size", 1)
    caption(photos, tiny_git, "--prompt", "a dog", status=1)
    assert "other settings (prompt)" in capsys.readouterr().err
    assert not (photos / "metadata.jsonl").exists()


def test_a_caption_written_by_hand_meanwhile_is_kept(photos, tiny_git, monkeypatch):
    real = Captioner.__call__

    def somebody_writes(*given):
        write_rows(photos, {"file_name": "b.png", "text": "by hand"})
        return real(*given)

    monkeypatch.setattr(Captioner, "__call__", somebody_writes)
    caption(photos, tiny_git)
    assert rows(photos)["b.png"] == {"file_name": "b.png", "text": "by hand"}
    assert len(rows(photos)) == 5


def test_an_image_that_cannot_be_read_is_named_and_all_others_are_done(photos, tiny_git, capsys):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:200])
    (photos / "c.png").write_bytes(b"")
    caption(photos, tiny_git, "--batch_size", 2, status=1)
    message = capsys.readouterr().err
    assert "(2): b.png (" in message and "c.png (" in message
    assert list(rows(photos)) == ["a.png", "more/d.png", "more/e.png"]
    caption(photos, tiny_git, "--on_bad_rows", "skip")


def test_limit_takes_the_first(photos, tiny_git):
    caption(photos, tiny_git, "--limit", 2)
    assert list(rows(photos)) == ["a.png", "b.png"]
    caption(photos, tiny_git, "--limit", 2)
    assert list(rows(photos)) == ["a.png", "b.png", "c.png", "more/d.png"]


def test_metadata_above_the_splits_and_below_them_is_found(tmp_path, tiny_git):
    folder = fill(tmp_path, ["train/a.png", "train/b.png", "train/more/c.png", "test/d.png"])
    write_rows(folder, {"file_name": "train/a.png", "text": "above"}, {"file_name": "d.png", "text": ""})
    write_rows(folder / "train/more", {"file_name": "c.png", "text": "below"})
    caption(folder, tiny_git)
    assert list(rows(folder / "train")) == ["b.png"]
    assert rows(folder)["train/a.png"]["text"] == "above" and rows(folder)["d.png"]["text"]
    assert rows(folder / "train/more") == {"c.png": {"file_name": "c.png", "text": "below"}}
    assert set(training_reads(folder)) == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_na', "metadata.jsonl line 2"),
        ("metadata.jsonl", b"5\n", "metadata.jsonl line 1"),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl is one JSON list"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\u00e9"}'.encode("latin-1"), "is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 5}', "'text'"),
        ("metadata.jsonl", b'{"file_name": "/home/me/a.png", "text": "x"}', "absolute"),
        ("metadata.csv", b"file_name,text\na.png,x\n", "prepare_dataset.py convert imagefolder"),
        ("a.txt", b"a hand-written caption", "convert sidecar"),
    ],
)
def test_what_could_lose_captions_is_refused_and_untouched(photos, tiny_git, capsys, name, content, said):
    (photos / name).write_bytes(content)
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    caption(photos, tiny_git, status=1)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and said in message
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_all_that_could_lose_captions_is_said_together(photos, tiny_git, capsys):
    (photos / "metadata.jsonl").write_text('nonsense\n{"file_name": "b.png", "text": 5}\n')
    (photos / "more/metadata.csv").write_text("file_name,text\n")
    (photos / "a.txt").write_text("a hand-written caption")
    caption(photos, tiny_git, status=1)
    message = capsys.readouterr().err
    for said in ("metadata.jsonl line 1", "metadata.jsonl line 2", "more/metadata.csv", "a.png"):
        assert said in message


def test_what_is_no_text_in_other_columns_is_kept(photos, tiny_git):
    line = '{"file_name": "a.png", "by": "half \\ud83d"}\n'
    (photos / "metadata.jsonl").write_text(line)
    caption(photos, tiny_git)
    assert rows(photos)["a.png"]["by"] == json.loads(line)["by"]


def test_rows_of_images_that_are_not_there_are_warnings_and_kept(photos, tiny_git, capsys):
    write_rows(photos, {"file_name": "gone.png", "text": "it was here"})
    caption(photos, tiny_git)
    assert "name no image of this folder" in capsys.readouterr().err
    assert rows(photos)["gone.png"] == {"file_name": "gone.png", "text": "it was here"} and len(rows(photos)) == 6


def test_everything_wrong_with_the_flags_is_said_together(tmp_path, capsys):
    flags = """--captioner florence2 --prompt hello --from_captions --add --overwrite --top_p 1.5 --num_beams 2
        --seed -1 --temperature 0 --min_length 9 --max_length 3 --batch_size 0 --limit 0
        --max_terms -1 --caption_column none --max_side 0"""
    with pytest.raises(SystemExit):
        caption_images.main([str(tmp_path / "none"), *flags.split()])
    message = capsys.readouterr().err
    for said in (
        "--prompt hello", "--from_captions", "--captioner clip-interrogator",
        "--add", "--overwrite", "--top_p 1.5", "--temperature 0", "--min_length 9",
        "--batch_size 0", "--limit 0", "--max_terms -1", "--caption_column none", "--max_side 0",
    ):  # fmt: skip
        assert said in message, said
    with pytest.raises(SystemExit):
        caption_images.main([str(tmp_path), "--captioner", "blop"])
    assert "blip, blip2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        caption_images.main([str(tmp_path), "--captioner", "clip-interrogator", "--from_captions", "--seed", "3"])
    message = capsys.readouterr().err
    assert "--add or --overwrite" in message and "--seed does nothing without --top_p" in message


def test_an_unknown_model_and_an_empty_folder_are_one_clear_message(photos, tiny_git, tmp_path, capsys):
    caption(photos, "nobody/nothing", status=1)
    assert "nobody/nothing" in capsys.readouterr().err
    assert not (photos / ".captions.jsonl").exists()
    (tmp_path / "empty").mkdir()
    caption(tmp_path / "empty", tiny_git, status=1)
    assert "there are no images in" in capsys.readouterr().err
