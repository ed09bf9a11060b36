"""The images of an evaluation: rows that are known to exist, drawings that go on, folders that are paired by name."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data.findings import DatasetError
from finetuning.evaluation.denoising import chosen_rows
from finetuning.evaluation.generation import GenerationArgs, Row, dataset_rows, general_rows, generate_rows, images_in
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families.lora_files import Layer, write_diffusers
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.rng import torch_generator

QUICK = GenerationArgs(num_inference_steps=2, guidance_scale=3.0)
ROWS = [Row(number, caption) for number, caption in enumerate(("a red circle", "a blue star", "a red circle", "a cat"))]
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [8, 8]


@dataclass
class Flags(GenerationArgs):
    """The flags alone."""


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """An opened pipeline; leave it as it is."""
    return open_pipeline(tiny_model, scheduler="dpm++")


@pytest.fixture
def quick(pipeline, tmp_path):
    """Generate into a folder of its own with the opened pipeline, or another's; keywords are flags."""

    def generated(rows=ROWS, source=pipeline, folder="generated", lora=None, weights="ema", **flags):
        messages, args, name = [], replace(QUICK, **flags), "tiny"
        if isinstance(source, str | Path):
            source, name = open_pipeline(source, weights=weights, scheduler=args.scheduler), source
        paths = generate_rows(
            source, rows, tmp_path / folder, args, name=name, lora=lora, weights=weights, say=messages.append
        )
        return paths, messages

    return generated


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    torch.manual_seed(0)
    layer = Layer(3 * torch.randn(2, 8), 3 * torch.randn(8, 2), 2.0)
    write_diffusers(path, {TO_Q: layer}, {"base_model": "another", "base_model_hash": "0" * 64})
    return path


@pytest.fixture
def dataset(tmp_path):
    """A dataset of one's own to spoil: three captioned images, no splits."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in ("a", "b", "c"):
        save(folder / f"{name}.png")
    describe(folder, a="first", b="second", c="third")
    return folder


def save(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


def describe(folder, **captions):
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def contents(paths):
    return {number: path.read_bytes() for number, path in paths.items()}


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_split_with_their_numbers(shapes_folder):
    rows = dataset_rows(shapes_folder, "train")
    lines = (shapes_folder / "train/metadata.jsonl").read_text().splitlines()
    expected = {one["file_name"]: one["text"] for one in map(json.loads, lines)}
    assert {row.image.name: row.caption for row in rows} == expected
    assert [row.number for row in rows] == list(range(11))
    assert [row.image for row in rows] == sorted(row.image for row in rows)
    some = dataset_rows(shapes_folder, "train", max_rows=4, seed=5)
    assert [row.number for row in some] == chosen_rows(11, 4, 5)
    assert some == [rows[row.number] for row in some]


def test_without_a_split_it_is_the_test_split_or_the_whole_folder(shapes_folder, tmp_path):
    assert len(dataset_rows(shapes_folder / "validation")) == 4
    with pytest.raises(DatasetError, match="has no split test, only train, validation"):
        dataset_rows(shapes_folder)
    copied = shutil.copytree(shapes_folder, tmp_path / "copied")
    (copied / "validation").rename(copied / "test")
    assert {row.image.parent.name for row in dataset_rows(copied)} == {"test"}


def test_of_several_captions_the_first_is_taken_and_said(dataset):
    describe(dataset, a=["first", "other"], b="second", c="third")
    said = []
    assert [row.caption for row in dataset_rows(dataset, say=said.append)] == ["first", "second", "third"]
    assert "rows with several captions" in said[0] and "line 1" in said[0]


def test_the_general_prompts_are_six_of_each_of_ten_categories():
    rows = general_rows()
    assert [row.number for row in rows] == list(range(60))
    assert set(Counter(row.category for row in rows).values()) == {6} and len({row.category for row in rows}) == 10
    assert len({row.caption.lower() for row in rows}) == 60 and all(row.image is None for row in rows)
    assert "Yoda" in {row.caption for row in rows}  # the seed's probe


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("mine.txt", "a cat\n\n  a dog \na cat\n", [("a cat", None), ("a dog", None), ("a cat", None)]),
    ("mine.json", '[{"caption": " a cat", "category": "animals"}, {"caption": "a dog"}]',
     [("a cat", "animals"), ("a dog", None)]),
])  # fmt: skip
def test_prompts_of_ones_own_take_their_place(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    rows = general_rows(tmp_path / name)
    assert [(row.number, row.caption, row.category) for row in rows] == [(i, *one) for i, one in enumerate(expected)]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("p.txt", "\n \n", "has no prompts"),
    ("p.json", "[]", "has no prompts"),
    ("p.json", "[", "cannot be read"),
    ("p.json", '{"caption": "a"}', "must be a list"),
    ("p.json", '["a", {"caption": " "}, {"caption": "b", "category": 3}, {"caption": "c"}]', "entry 1, 2, 3$"),
    ("p.jsonl", "{}", "must be a .txt"),
    ("p.txt", None, "cannot be read"),
])  # fmt: skip
def test_prompts_that_cannot_be_read_are_named(name, text, said, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=rf"(?s)--general_prompts .*{name}.*{said}"):
        general_rows(tmp_path / name)


def test_flags_that_cannot_be_are_all_named(problems_of):
    assert problems_of(Flags) == []
    assert "--size 30 must be a multiple of 8" in problems_of(Flags, size=30)[0]
    assert len(problems_of(Flags, num_inference_steps=0, batch_size=0)) == 2


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_a_row_is_drawn_from_its_own_noise(pipeline, quick):
    paths, _ = quick(seed=7, size="32x40", negative_prompt="a dog")
    assert {number: path.name for number, path in paths.items()} == {n: f"{n:05d}.png" for n in range(4)}
    for row in ROWS:
        expected = pipeline(
            row.caption, negative_prompt="a dog", guidance_scale=3.0, num_inference_steps=2, height=32, width=40,
            generator=torch_generator(7, "evaluation", row.number),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(expected, dtype=int) - pixels(paths[row.number])).max() <= 1
    assert np.abs(pixels(paths[0]) - pixels(paths[2])).mean() > 5  # of one caption, but of two rows


def test_what_is_there_stays_and_what_is_missing_or_cut_is_drawn_again(quick):
    paths, _ = quick(batch_size=3)
    before = contents(paths)
    paths[1].unlink()
    cut(paths[3])
    kept = {number: paths[number].stat().st_mtime_ns for number in (0, 2)}
    assert quick(batch_size=3) == (paths, [])
    assert contents(paths) == before
    assert kept == {number: paths[number].stat().st_mtime_ns for number in kept}


def test_an_image_that_was_being_written_does_not_count(quick, monkeypatch, tmp_path):
    original = Image.Image.save

    def killed(image, path, **how):
        original(image, path, **how)
        cut(Path(path))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Image.Image, "save", killed)
        quick()
    assert list((tmp_path / "generated").glob("*.png")) == []
    assert contents(quick()[0]) == contents(quick(folder="other")[0])


@pytest.mark.parametrize(("flags", "said"), [
    ({"guidance_scale": 1.0}, r"guidance_scale 3\.0, now 1\.0"),
    ({"num_inference_steps": 3, "seed": 1}, "seed 0, now 1; num_inference_steps 2, now 3"),
    ({"size": "40"}, r"size \[32, 32\], now \[40, 40\]"),
    ({"negative_prompt": "a dog"}, "negative_prompt None, now a dog"),
])  # fmt: skip
def test_a_folder_of_other_settings_is_refused_and_named(flags, said, quick):
    paths, _ = quick(ROWS[:1])
    before = contents(paths)
    with pytest.raises(EvaluationError, match=rf"{said}\): name another --output_dir, or .* --overwrite"):
        quick(ROWS[:1], **flags)
    assert contents(paths) == before
    again, notes = quick(ROWS[:1], **flags, overwrite=True)
    assert "1 images of other settings are removed" in notes[0] and contents(again) != before
    assert quick(ROWS[:1], **flags)[1] == []


@pytest.mark.parametrize(("how", "said"), [
    ({"weights": "raw"}, r"\(unet_sha256 \w{12}, now \w{12}\)"), ({"scheduler": "ddim"}, "scheduler DPM.*, now DDIM"),
])  # fmt: skip
def test_a_changed_model_is_noticed(how, said, tiny_model, quick):
    quick(ROWS[:1], source=tiny_model)
    with pytest.raises(EvaluationError, match=said):
        quick(ROWS[:1], source=tiny_model, **how)


def test_a_model_that_was_moved_is_the_same(tiny_model, quick, tmp_path):
    paths, _ = quick(source=tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert quick(source=moved) == (paths, [])


def test_rows_of_other_captions_are_drawn_again(quick):
    paths, _ = quick(batch_size=1)
    before = contents(paths)
    changed = [*ROWS[:2], Row(2, "a green square"), ROWS[3]]
    said = quick(changed, batch_size=1)[1]
    assert "1 images of other captions are removed" in said[0]
    assert [contents(paths)[number] == before[number] for number in range(4)] == [True, True, False, True]
    assert quick(changed[:1])[1] == quick(changed)[1] == []  # fewer rows forget nothing of the others


def test_a_kill_among_the_removals_leaves_no_image_of_another_caption(quick, monkeypatch):
    quick()
    changed = [*ROWS[:2], Row(2, "a green square"), ROWS[3]]

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        quick(changed)
    assert contents(quick(changed)[0]) == contents(quick(changed, folder="other")[0])


@pytest.mark.parametrize("overwrite", [False, True])
def test_images_of_somebody_else_are_never_touched(overwrite, quick, tmp_path):
    save(tmp_path / "generated/00002.png")
    with pytest.raises(EvaluationError, match=r"not generated here \(00002.png\)"):
        quick(overwrite=overwrite)
    (tmp_path / "sweep").mkdir()
    write_json(tmp_path / "sweep/settings.json", {"ratios": [0, 1]})
    with pytest.raises(EvaluationError, match=r"settings\.json is not of images of an evaluation"):
        quick(folder="sweep", overwrite=overwrite)
    assert json.loads((tmp_path / "sweep/settings.json").read_text()) == {"ratios": [0, 1]}


def test_values_that_are_not_finite_are_named_and_not_written(tiny_model, quick, tmp_path):
    broken = open_pipeline(tiny_model, scheduler="dpm++")
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(ModelError, match="a red circle"):
        quick(ROWS[:2], source=broken)
    assert list((tmp_path / "generated").glob("*.png")) == []


def test_a_lora_acts_at_its_scale_and_comes_off_again(pipeline, lora_file, quick):
    plain = contents(quick(ROWS[:1])[0])
    off, said = quick(ROWS[:1], lora=lora_file, folder="off", lora_scale=0.0)
    assert contents(off) == plain and "was made for another" in said[0]
    full = contents(quick(ROWS[:1], lora=lora_file, folder="full")[0])
    half = contents(quick(ROWS[:1], lora=lora_file, folder="half", lora_scale=0.5)[0])
    assert len({plain[0], full[0], half[0]}) == 3
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    with pytest.raises(EvaluationError, match=r"lora_scale 0\.5, now 1\.0"):
        quick(ROWS[:1], lora=lora_file, folder="half")
    with pytest.raises(EvaluationError, match="lora_sha256 None, now"):
        quick(ROWS[:1], lora=lora_file)


# -- ready images --------------------------------------------------------------------------------------------------

TRUE_ROWS = [Row(0, "first", Path("true/b.png")), Row(1, "second", Path("true/c.png")), Row(2, "third", Path("a.png"))]


@pytest.mark.parametrize(("names", "captions"), [
    (["00000.png", "00001.png", "00002.png"], {}),
    (["0.png", "1.jpg", "2.png"], {}),
    (["b.png", "c.png", "a.jpg"], {}),
    (["some/b.png", "c.webp", "more/a.png"], {}),
    (["x.png", "y.png", "z.png"], {"z": "third", "x": "first", "y": "second"}),
    (["0.png", "1.png", "2.png"], {"0": "first", "1": ["other", "second"]}),
    (["2.png", "0.png", "1.png"], {"2": "first", "0": "second", "1": "third"}),  # what they show goes before numbers
])  # fmt: skip
def test_images_find_their_rows(names, captions, tmp_path):
    for name in names:
        save(tmp_path / name)
    if captions:
        describe(tmp_path, **captions)
    found = images_in(tmp_path, TRUE_ROWS)
    assert found == {number: tmp_path / name for number, name in enumerate(names)}


@pytest.mark.parametrize(("names", "captions", "said"), [
    (["0.png", "1.png"], {}, ["rows without an image (1): row 2 (third)"]),
    (["0.png", "1.png", "2.png", "grid.png"], {}, ["images without a row (1): grid.png"]),
    (["0.png", "00000.png", "1.png", "2.png"], {}, ["images without a row (2): 0.png; 00000.png", "row 0 (first)"]),
    (["x.png", "y.png", "z.png"], {}, ["images without a row (3): x.png; y.png; z.png", "rows without an image (3)"]),
    (["0.png", "1.png", "2.png"], {"1": "a cat"}, ["images without a row (1): 1.png (a cat)", "row 1 (second)"]),
    (["0.png", "1.png", "2.png"], {"7": "a cat"}, ["rows whose image is not there", "line 1 (7.png)"]),
    (["x.png", "y.png", "z.png"], {"x": "first", "y": "first", "z": "third"}, ["x.png (first); y.png (first)"]),
])  # fmt: skip
def test_what_stays_alone_is_named_on_both_sides(names, captions, said, tmp_path):
    for name in names:
        save(tmp_path / name)
    if captions:
        describe(tmp_path, **captions)
    with pytest.raises(EvaluationError) as problem:
        images_in(tmp_path, TRUE_ROWS)
    assert all(words in str(problem.value) for words in said), problem.value


def test_names_that_fit_in_two_ways_are_refused(tmp_path):
    rows = [Row(0, "first", Path("1.png")), Row(1, "second", Path("0.png"))]
    for name in ("0.png", "1.png"):
        save(tmp_path / name)
    with pytest.raises(EvaluationError, match=r"2 errors(?s:.*)0\.png; 1\.png"):
        images_in(tmp_path, rows)
    describe(tmp_path, **{"0": "second", "1": "first"})
    assert images_in(tmp_path, rows) == {0: tmp_path / "1.png", 1: tmp_path / "0.png"}


def test_images_that_cannot_be_read_are_named_with_all_else(tmp_path):
    for name in ("0.png", "1.png", "3.png"):
        save(tmp_path / name)
    cut(tmp_path / "0.png")
    with pytest.raises(EvaluationError, match=r"(?s)3 errors.*3\.png.*row 2.*0\.png \("):
        images_in(tmp_path, TRUE_ROWS)


def test_order_alone_pairs_only_where_it_is_asked_for_and_beyond_doubt(tmp_path):
    for name in ("out-2.png", "out-3.png"):
        save(tmp_path / name)
    with pytest.raises(EvaluationError, match=r"(?s)out-2\.png; out-3\.png.*row 0"):
        images_in(tmp_path, TRUE_ROWS, by_order=True)
    save(tmp_path / "out-10.png")
    with pytest.raises(EvaluationError, match="out-10"):
        images_in(tmp_path, TRUE_ROWS, by_order=True)
    (tmp_path / "out-10.png").rename(tmp_path / "out-4.png")
    found = images_in(tmp_path, TRUE_ROWS, by_order=True)
    assert found == {n: tmp_path / f"out-{n + 2}.png" for n in range(3)}
    describe(tmp_path, **{"out-3": "first"})
    with pytest.raises(EvaluationError, match=r"out-3\.png \(first\)"):
        images_in(tmp_path, TRUE_ROWS, by_order=True)


def test_what_was_drawn_is_ready_for_the_same_captions_alone(quick, tmp_path):
    paths, _ = quick()
    assert images_in(tmp_path / "generated", ROWS) == paths
    others = [*ROWS[:3], Row(3, "a dog")]
    with pytest.raises(EvaluationError, match=r"00003\.png \(a cat\).*\n.*row 3 \(a dog\)"):
        images_in(tmp_path / "generated", others)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_without_images_is_named(is_there, tmp_path):
    if is_there:
        (tmp_path / "ready").mkdir()
    with pytest.raises(EvaluationError, match="there are no images in" if is_there else "there is no folder"):
        images_in(tmp_path / "ready", TRUE_ROWS)
