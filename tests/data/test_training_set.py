"""From the dataset flags to batches: every fault named at once, and batches that are functions of their place."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image
from transformers import CLIPTokenizer

from finetuning.cli import problems_of
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.order import Order, Place
from finetuning.data.reading import DatasetError
from finetuning.data.rows import Row, Rows
from finetuning.data.training_set import DataArgs, ImageSet, load_images, tokens
from finetuning.data.transforms import Transform
from models.make_start import vocabulary


@dataclass
class DataFlags(BucketArgs, CaptionArgs, DataArgs):
    """Every flag of a dataset."""


@pytest.fixture(scope="module")
def tokenizer():
    entries, merges = vocabulary()
    return CLIPTokenizer(vocab=entries, merges=merges, model_max_length=16)


def noise(seed, side=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def jsonl(path, rows):
    path.write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """11 images of noise, 00.png to 10.png, captioned "circle", "circle circle", ..."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(11):
        noise(index).save(folder / f"{index:02d}.png")
    jsonl(folder / "metadata.jsonl", [(f"{index:02d}.png", "circle " * (index + 1)) for index in range(11)])
    return folder


@pytest.fixture
def load(folder, tokenizer):
    """Load the folder with some flags; (training set, validation set or None, what was said)."""

    def load(seed=0, validation_fraction=0.0, train_data_dir=folder, **flags):
        said = []
        args = DataFlags(train_data_dir=train_data_dir and str(train_data_dir), resolution="8", **flags)
        training, held_out = load_images(args, tokenizer, seed, validation_fraction, said.append)
        return training, held_out, "\n".join(said)

    return load


def names(images):
    return [row.image.name for row in images.rows]


def batches(images, first_step=0, last_step=5, workers=0, process=0, **layout):
    layout = {"micro_batch": 4, "accumulation": 1, "processes": 1} | layout
    order = Order(rows=len(images), process=process, seed=0, **layout)
    return list(images.loader(order, first_step, last_step, workers))


def content(batch):
    """Everything in a batch, ready to compare."""
    tensors = tuple(t.numpy().tobytes() for t in (batch.pixels, batch.input_ids, batch.weights))
    return (*tensors, batch.rows, batch.step, batch.epoch, batch.ends_step)


# What is wrong with the dataset


@pytest.fixture
def broken(folder):
    """One fault of each kind beside 7 good rows."""
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "01.png").write_text("<html>not found</html>")
    captions = {index: "circle" for index in range(11)} | {2: "  "}
    rows = [(f"{index:02d}.png", captions[index]) for index in range(11) if index != 3]
    jsonl(folder / "metadata.jsonl", [*rows, ("gone.png", "circle"), ("../secret.png", "circle")])
    noise(0).save(folder.parent / "secret.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "cut\n')
    return folder


def test_all_faults_are_reported_at_once_with_counts_and_names(broken, load):
    with pytest.raises(DatasetError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith("the dataset has 7 faults (x):")
    lines = [line.strip() for line in message.splitlines()]
    named = {
        "x 2 images that cannot be read: ": ["00.png", "truncated", "01.png", "cannot identify"],
        "x 1 rows with an empty caption: ": ["metadata.jsonl line 3 (02.png)"],
        "x 1 images that no metadata row names: ": ["03.png"],
        "x 1 rows whose image is not there: ": ["metadata.jsonl line 11 (gone.png)"],
        "x 1 rows that reach outside": ["metadata.jsonl line 12 (../secret.png)", "--allow_outside_paths"],
        "x 1 metadata lines that are not JSON: ": ["metadata.jsonl line 13"],
    }
    for start, words in named.items():
        (line,) = [line for line in lines if line.startswith(start)]
        assert [word for word in words if word not in line] == []
    assert "--on_bad_rows skip" in lines[-1]


def test_skip_leaves_the_bad_rows_out_and_says_so(broken, load):
    training, _, said = load(on_bad_rows="skip")
    assert names(training) == [f"{index:02d}.png" for index in range(4, 11)]
    assert "left out (x)" in said
    assert "x 2 images that cannot be read" in said
    assert "metadata.jsonl line 11 (gone.png)" in said
    assert sum(len(batch.rows) for batch in batches(training, last_step=2)) == 7


def test_nothing_left_to_train_on_is_a_problem(folder, load):
    jsonl(folder / "metadata.jsonl", [("00.png", "")])
    with pytest.raises(DatasetError, match="no row is left"):
        load(on_bad_rows="skip")


def test_header_check_misses_a_cut_image_that_the_full_check_names(folder, load):
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:200])
    assert len(load(check_images="header")[0]) == 11
    with pytest.raises(DatasetError, match=r"1 images that cannot be read: metadata.jsonl line 1 .*00\.png"):
        load(check_images="full")


def test_header_check_names_what_is_no_image_at_all(folder, load):
    (folder / "00.png").write_text("<html>not found</html>")
    with pytest.raises(DatasetError, match="1 images that cannot be read"):
        load(check_images="header")


@pytest.mark.parametrize("check", ["full", "header"])
def test_animated_images_are_kept_and_noted(folder, load, check):
    jsonl(folder / "metadata.jsonl", [*((f"{i:02d}.png", "circle") for i in range(11)), ("moving.gif", "star")])
    noise(0).save(folder / "moving.gif", save_all=True, append_images=[noise(1)])
    training, _, said = load(check_images=check)
    assert len(training) == 12
    assert "- 1 animated images (the first frame is used): metadata.jsonl line 12" in said


def test_a_clean_dataset_needs_no_words(load):
    assert load()[2] == ""


def test_cut_captions_are_noted_with_their_length(folder, load):
    # 14 words are read beside the start and the end token; the last caption has 15.
    rows = [(f"{index:02d}.png", "circle " * (index + 5)) for index in range(11)]
    jsonl(folder / "metadata.jsonl", rows)
    training, _, said = load()
    assert len(training) == 11
    assert said.endswith("- 1 captions longer than 16 tokens (the end is not read): metadata.jsonl line 11, 17 tokens")


def test_faults_of_the_validation_split_count_too(folder, load):
    shutil.copytree(folder, folder / "validation")
    (folder / "validation/00.png").write_text("no image")
    with pytest.raises(DatasetError, match=r"1 images that cannot be read: validation/metadata.jsonl line 1 "):
        load()


# Which rows are trained on


def test_max_train_samples_draws_rows_with_the_seed(load):
    chosen = {seed: names(load(seed, max_train_samples=4)[0]) for seed in range(5)}
    assert all(len(set(one)) == 4 for one in chosen.values())
    assert chosen[0] == names(load(0, max_train_samples=4)[0])
    assert len(set(map(tuple, chosen.values()))) > 1


def test_max_train_samples_above_the_number_of_rows_uses_all_and_says_so(load):
    training, _, said = load(max_train_samples=12)
    assert len(training) == 11
    assert "--max_train_samples above the number of rows (all are used): 12 of 11" in said
    assert load(max_train_samples=11)[2] == ""


def test_validation_fraction_holds_out_rows_of_their_own(load):
    splits = [load(seed, 0.25)[:2] for seed in range(4)]
    for training, held_out in splits:
        assert len(held_out) == 3  # 0.25 x 11 = 2.75
        assert sorted(names(training) + names(held_out)) == [f"{index:02d}.png" for index in range(11)]
    assert names(splits[0][1]) == names(load(0, 0.25)[1])
    assert len({tuple(names(held_out)) for _, held_out in splits}) > 1


def test_held_out_rows_do_not_depend_on_max_train_samples(load):
    assert names(load(0, 0.25, max_train_samples=2)[1]) == names(load(0, 0.25)[1])


def test_rows_of_one_image_are_held_out_together(folder, load):
    rows = [(f"{index:02d}.png", caption) for index in range(11) for caption in ("circle", "square", "star")]
    jsonl(folder / "metadata.jsonl", rows)
    training, held_out, _ = load(0, 0.25)
    assert len(training) + len(held_out) == 33
    assert not set(names(training)) & set(names(held_out))


def test_a_fraction_that_leaves_nothing_to_train_on_is_a_problem(load):
    with pytest.raises(DatasetError, match="no row is left"):
        load(0, 0.99)


def test_faults_are_named_even_where_they_leave_nothing_to_hold_out(folder, load):
    jsonl(folder / "metadata.jsonl", [(f"{index:02d}.png", "") for index in range(11)])
    with pytest.raises(DatasetError, match="11 rows with an empty caption"):
        load(0, 0.25)


def test_validation_split_of_the_folder_comes_before_the_fraction(folder, load):
    (folder / "val").mkdir()
    shutil.copy(folder / "00.png", folder / "val/v.png")
    jsonl(folder / "val/metadata.jsonl", [("v.png", "star")])
    training, held_out, _ = load(0, 0.25)
    assert (len(training), names(held_out)) == (11, ["v.png"])


def test_held_out_images_are_neither_cropped_nor_flipped_nor_stripped_of_captions_at_random(load):
    _, held_out, _ = load(0, 0.5, random_flip=True, random_resized_crop_scale=0.3, proportion_empty_prompts=1.0)
    for row in range(len(held_out)):
        pixels = [held_out.transform(held_out.image(row), epoch, row) for epoch in range(6)]
        assert all(torch.equal(pixels[0], other) for other in pixels)
        assert held_out.caption(row, 0) == held_out.rows[row].captions[0]


# Captions


def captions_only(captions, dropout=0.0, seed=0, random_flip=False, **flags):
    rows = Rows.of(Row(index, texts, f"row {index}") for index, texts in enumerate(captions))
    transform = Transform(8, 8, True, random_flip, "box", None, seed)
    args = DataFlags(proportion_empty_prompts=dropout, **flags)
    return ImageSet(rows, None, [(8, 8)] * len(rows), transform, None, args, seed)


def drawn(images, epoch=0):
    return [images.caption(row, epoch) for row in range(len(images))]


def test_caption_dropout_has_the_share_asked_for():
    images = captions_only([("circle",)] * 2000, dropout=0.1)
    dropped = drawn(images).count("")
    assert 133 < dropped < 267  # 200, five deviations of a binomial
    assert drawn(captions_only([("circle",)] * 100, dropout=0.0)).count("") == 0
    assert drawn(captions_only([("circle",)] * 100, dropout=1.0)).count("") == 100


def test_a_prefix_stands_before_what_is_not_dropped():
    assert set(drawn(captions_only([("circle",)] * 50, 0.5, caption_prefix="interior design,"))) == {
        "", "interior design, circle"
    }  # fmt: skip


def test_the_prefix_of_the_metadata_is_the_flags_and_the_captions_own():
    rows = [("my dog on grass",), ("my dog in water", "my dog"), ("my dog asleep",)]
    assert captions_only(rows).caption_prefix() == "my dog"
    assert captions_only(rows, caption_prefix="sks,").caption_prefix() == "sks, my dog"
    assert captions_only([("a cat",), ("my dog",)]).caption_prefix() == ""


def test_tags_are_shuffled_anew_each_epoch_but_the_first_stay():
    tagged = captions_only([("sks, a, b, c, d",)] * 20, shuffle_tags=True, keep_tokens=1)
    epochs = [drawn(tagged, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1] and epochs[0] == drawn(tagged, 0)
    assert all(sorted(text.split(", ")) == ["a", "b", "c", "d", "sks"] for text in epochs[0])
    assert all(text.startswith("sks, ") for epoch in epochs for text in epoch)


def test_the_first_of_several_captions_can_be_asked_for():
    assert set(drawn(captions_only([("one", "two")] * 30, caption_choice="first"))) == {"one"}
    assert set(drawn(captions_only([("one", "two")] * 30))) == {"one", "two"}


SIDES = [("a cat to the left", "a cat"), ("a cat",)] * 20


@pytest.mark.parametrize(
    ("flip_captions", "mirrored", "texts"),
    [
        ("skip", {1}, {"a cat to the left", "a cat"}),
        ("swap", {0, 1}, {"a cat to the left", "a cat to the right", "a cat"}),
        ("ignore", {0, 1}, {"a cat to the left", "a cat"}),
    ],
)
def test_a_caption_that_names_a_side_is_not_wrong_after_mirroring(flip_captions, mirrored, texts):
    images = captions_only(SIDES, random_flip=True, flip_captions=flip_captions)
    places = [(row, epoch) for row in range(40) for epoch in range(3)]
    assert {row % 2 for row, epoch in places if images.is_mirrored(row, epoch)} == mirrored
    assert {images.caption(row, epoch) for row, epoch in places} == texts
    if flip_captions == "swap":
        told = {(images.is_mirrored(*place), images.caption(*place)) for place in places if place[0] % 2 == 0}
        assert (True, "a cat to the left") not in told and (False, "a cat to the right") not in told


def test_pixels_are_mirrored_where_the_caption_allows_it_and_the_rest_is_counted(folder, load):
    rows = [(f"{index:02d}.png", "left" if index < 5 else "circle") for index in range(11)]
    jsonl(folder / "metadata.jsonl", rows)
    mirrored, _, said = load(random_flip=True, center_crop=True)
    plain = load(center_crop=True)[0]
    assert "5 captions that say left or right: these images are not mirrored" in said
    places = [Place(row, epoch, 0, 1.0, True) for row in range(11) for epoch in range(4)]
    for place in places:
        flipped = torch.equal(mirrored[place][1], plain[place][1].flip(-1))
        assert flipped == mirrored.is_mirrored(place.row, place.epoch)
    assert {place.row for place in places if mirrored.is_mirrored(place.row, place.epoch)} <= set(range(5, 11))


def test_unchecked_images_are_named_when_their_turn_comes(folder, load):
    (folder / "03.png").write_bytes(b"no image")
    training = load(check_images="none")[0]
    assert len(training) == 11 and training.image(2).size == (12, 12)
    with pytest.raises(DatasetError, match=r"metadata.jsonl line 4: .*03\.png.*--check_images full names all"):
        training.image(3)


def test_cut_captions_are_counted_with_the_prefix(folder, load):
    assert "captions longer than" not in load(max_train_samples=1)[2]
    words = "circle " * 20
    assert "11 captions longer than 16 tokens" in load(caption_prefix=words)[2]


def test_caption_dropout_is_a_function_of_seed_epoch_and_row():
    many = [("circle",)] * 200
    once = drawn(captions_only(many, 0.5))
    assert once == drawn(captions_only(many, 0.5))
    assert once != drawn(captions_only(many, 0.5), epoch=1)
    assert once != drawn(captions_only(many, 0.5, seed=1))


def test_each_of_several_captions_is_drawn_as_often():
    images = captions_only([("one", "two", "three")])
    found = [images.caption(0, epoch) for epoch in range(900)]
    assert [found.count(text) for text in ("one", "two", "three")] == pytest.approx([300] * 3, abs=71)


def test_flags_reach_the_images_and_captions(load):
    training, _, _ = load(
        seed=3, proportion_empty_prompts=1.0, center_crop=True, random_flip=True, image_interpolation_mode="box",
        random_resized_crop_scale=0.4,
    )  # fmt: skip
    assert training.transform == Transform(8, 8, True, True, "box", 0.4, 3)
    assert {training.caption(row, 0) for row in range(11)} == {""}
    assert load()[0].transform == Transform(8, 8, False, False, "lanczos", None, 0)


def test_tokens_are_padded_and_cut_to_the_text_encoders_length(tokenizer):
    ids = tokens(tokenizer, ["circle", "", "circle " * 50])
    start, circle = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("circle</w>")
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids.tolist() == [
        [start, circle, end, *[padding] * 13],
        [start, end, *[padding] * 14],
        [start, *[circle] * 14, end],
    ]


def test_fingerprint_changes_with_captions_rows_and_their_order_but_not_with_the_place(folder, load):
    whole = load()[0].fingerprint()
    assert load(seed=5)[0].fingerprint() == whole
    moved = shutil.copytree(folder, folder.parent / "moved")
    assert load(train_data_dir=moved)[0].fingerprint() == whole
    assert load(max_train_samples=10)[0].fingerprint() != whole
    rows = [(f"{index:02d}.png", "circle " * (index + 1)) for index in range(11)]
    jsonl(folder / "metadata.jsonl", [*rows[:10], ("10.png", "star")])
    assert load()[0].fingerprint() != whole
    training = load(train_data_dir=moved)[0]
    training.rows = training.rows[::-1]
    assert training.fingerprint() != whole


def test_rows_are_described_by_origin_image_and_caption(folder, load):
    assert load()[0].describe([0, 2]) == (
        f"  metadata.jsonl line 1: {folder / '00.png'} 'circle'\n"
        f"  metadata.jsonl line 3: {folder / '02.png'} 'circle circle circle'"
    )


# Batches


RANDOM = {"random_flip": True, "random_resized_crop_scale": 0.5, "proportion_empty_prompts": 0.3}


def test_a_batch_holds_what_its_places_say(load, tokenizer):
    training, _, _ = load(center_crop=True)
    first, second, third = batches(training, last_step=3)
    assert [len(batch.rows) for batch in (first, second, third)] == [4, 4, 3]
    assert (first.pixels.shape, first.pixels.dtype) == ((4, 3, 8, 8), torch.float32)
    assert (
        first.input_ids.tolist() == tokens(tokenizer, [training.rows[row].captions[0] for row in first.rows]).tolist()
    )
    assert first.weights.tolist() == [0.25] * 4
    assert third.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert (third.step, third.epoch, third.ends_step) == (2, 0, True)
    for row, pixels in zip(first.rows, first.pixels, strict=True):
        assert torch.equal(pixels, training.transform(training.image(row), 0, row))


def test_black_and_white_become_minus_one_and_one(folder, load):
    for index in range(11):
        Image.new("L", (8, 8), 255 * (index % 2)).save(folder / f"{index:02d}.png")
    for batch in batches(load()[0]):
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            assert torch.equal(pixels, torch.full((3, 8, 8), 2.0 * (row % 2) - 1))


def test_two_workers_give_the_batches_of_none(load):
    training, _, _ = load(**RANDOM)
    alone, helped = batches(training), batches(training, workers=2)
    assert len(alone) == 5
    assert [content(batch) for batch in helped] == [content(batch) for batch in alone]


def test_batches_after_a_resume_are_the_tail_of_the_whole_run(load):
    training, _, _ = load(**RANDOM)
    whole = [content(batch) for batch in batches(training, 0, 6)]
    assert len(set(map(str, whole))) == 6
    for start in range(6):
        assert [content(batch) for batch in batches(training, start, 6)] == whole[start:]


@pytest.mark.parametrize(
    "layout", [{"micro_batch": 2, "processes": 2}, {"micro_batch": 1, "accumulation": 4}], ids=["2 x 2", "4 of 1"]
)
def test_layouts_of_one_global_batch_see_the_same_pixels_and_captions(load, layout):
    training, _, _ = load(**RANDOM)

    def seen(**layout):
        found = {}
        for process in range(layout.get("processes", 1)):
            for batch in batches(training, process=process, **layout):
                for row, pixels, ids in zip(batch.rows, batch.pixels, batch.input_ids, strict=True):
                    found[batch.step, row] = (pixels.numpy().tobytes(), ids.tolist())
        return found

    assert seen(**layout) == seen(micro_batch=4)


def test_batches_move_to_a_device_whole(load):
    batch = batches(load()[0], last_step=1)[0].to("meta")
    assert {batch.pixels.device.type, batch.input_ids.device.type, batch.weights.device.type} == {"meta"}


# Buckets


SIDEWAYS = 6  # EXIF orientation: shown turned by 90 degrees
SIZES = [(16, 16), (12, 32), (32, 12), (24, 16)]  # (height, width) as a person sees them


def saved_with_orientation(path, size, orientation):
    """Noise that is shown as (height, width) `size`, stored turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    height, width = size if orientation < 5 else size[::-1]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.fixture
def load_shapes(tmp_path, tokenizer):
    """A folder of 12 images of four sizes, every second one turned by EXIF, with a validation split alike."""
    for split, count in (("train", 12), ("validation", 4)):
        (tmp_path / split).mkdir()
        for index in range(count):
            path, orientation = tmp_path / f"{split}/{index:02d}.png", SIDEWAYS if index % 2 else 1
            saved_with_orientation(path, SIZES[index % 4], orientation)
        jsonl(tmp_path / f"{split}/metadata.jsonl", [(f"{index:02d}.png", "circle") for index in range(count)])

    def load(**flags):
        said = []
        flags = {"aspect_buckets": True, "bucket_step": 4, "min_side": 8} | flags
        args = DataFlags(train_data_dir=str(tmp_path), resolution="16", **flags)
        training, held_out = load_images(args, tokenizer, 0, say=said.append)
        return training, held_out, "\n".join(said)

    return load


@pytest.mark.parametrize("check", ["full", "header"])
def test_each_row_is_trained_at_the_size_of_its_bucket(load_shapes, check):
    training, held_out, said = load_shapes(check_images=check)
    buckets = [(16, 16), (8, 24), (24, 8), (20, 12)]
    assert training.sizes == buckets * 3
    assert held_out.sizes == buckets
    assert "- 4 buckets, height x width: rows: 16x16: 3; 8x24: 3; 24x8: 3; 20x12: 3" in said
    for row, (height, width) in enumerate(buckets * 3):
        _, pixels, _ = training[Place(row, 0, 0, 1.0, True)]
        assert pixels.shape == (3, height, width)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("check", ["full", "header"])
def test_sizes_are_those_of_the_image_as_it_is_shown(tmp_path, tokenizer, ending, orientation, check):
    saved_with_orientation(tmp_path / f"x.{ending}", (12, 32), orientation)
    jsonl(tmp_path / "metadata.jsonl", [(f"x.{ending}", "circle")])
    flags = {"aspect_buckets": True, "bucket_step": 4, "check_images": check}
    args = DataFlags(train_data_dir=str(tmp_path), resolution="16", **flags)
    assert load_images(args, tokenizer, 0, say=str)[0].sizes == [(8, 24)]


def test_batches_of_buckets_are_of_one_size_and_functions_of_their_place(load_shapes):
    training, _, _ = load_shapes(random_flip=True)
    order = Order(12, 2, 1, 1, 0, seed=0, buckets=training.sizes)
    assert order.steps_per_epoch == 8
    load = lambda first, workers: [content(batch) for batch in training.loader(order, first, 10, workers)]
    whole = load(0, 0)
    assert len(whole) == 10
    assert load(3, 2) == whole[3:]
    for batch in training.loader(order, 0, 8, 0):
        [size] = {training.sizes[row] for row in batch.rows}
        assert batch.pixels.shape == (len(batch.rows), 3, *size)


def test_rows_are_listed_by_size_for_work_that_goes_by_batches(load_shapes):
    training, _, _ = load_shapes()
    assert list(training.of_one_size([7, 4, 8, 3, 0, 5], 2)) == [[7, 3], [4, 8], [0], [5]]
    assert list(load_shapes(aspect_buckets=False, bucket_step=64, min_side=None)[0].of_one_size(range(5), 2)) == [
        [0, 1], [2, 3], [4],
    ]  # fmt: skip


def test_fingerprint_changes_with_the_buckets_but_not_where_all_are_square(load_shapes, folder, tokenizer):
    plain = {"aspect_buckets": False, "bucket_step": 64, "min_side": None}
    found = [load_shapes(**flags)[0].fingerprint() for flags in (plain, {}, {"bucket_step": 8}, {"bucket_step": 8})]
    assert len(set(found[:3])) == 3 and found[2] == found[3]

    square = DataFlags(train_data_dir=str(folder), resolution="8", aspect_buckets=True, bucket_step=4)
    off = DataFlags(train_data_dir=str(folder), resolution="8")
    assert load_images(square, tokenizer, 0, say=str)[0].fingerprint() == (
        load_images(off, tokenizer, 0)[0].fingerprint()
    )


def test_too_small_images_stop_the_run_or_are_left_out(load_shapes):
    with pytest.raises(DatasetError) as caught:
        load_shapes(min_side=16, max_upscale=1)  # 6 training rows and 2 held out have a side of 12
    assert "the dataset has 8 faults" in str(caught.value)
    assert "train/metadata.jsonl line 2 (12x32); train/metadata.jsonl line 3 (32x12)" in str(caught.value)
    training, held_out, said = load_shapes(min_side=16, max_upscale=1, on_bad_rows="skip")
    assert training.sizes == [(16, 16)] * 6 and held_out.sizes == [(16, 16)] * 2
    assert [row.image.name for row in training.rows] == ["00.png", "03.png", "04.png", "07.png", "08.png", "11.png"]
    assert "x 8 images too small for any bucket" in said


def test_a_broken_header_is_named_and_not_a_stack_trace(load_shapes, tmp_path):
    (tmp_path / "train/00.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    with pytest.raises(DatasetError, match=r"1 images that cannot be read: train/metadata.jsonl line 1 .*00\.png"):
        load_shapes(check_images="header")


def test_images_inside_a_dataset_go_into_buckets(tmp_path, tokenizer):
    columns = Features({"image": ImageFeature(), "text": Value("string")})
    for index, size in enumerate(SIZES):
        saved_with_orientation(tmp_path / f"{index}.png", size, SIDEWAYS)
    stored = [{"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": None} for index in range(4)]
    part = Dataset.from_dict({"image": stored, "text": ["circle"] * 4}, features=columns)
    part.to_parquet(tmp_path / "hub/train.parquet")
    flags = {"aspect_buckets": True, "bucket_step": 4}
    args = DataFlags(train_data_dir=str(tmp_path / "hub"), resolution="16", **flags)
    training, _ = load_images(args, tokenizer, 0, say=str, cache_dir=str(tmp_path / "cache"))
    assert training.sizes == [(16, 16), (8, 24), (24, 8), (20, 12)]


# Datasets with the images inside


@pytest.fixture
def hub_folder(tmp_path):
    """A folder of parquet files as the Hub has them, train and validation, its first image transparent."""
    columns = Features({"image": ImageFeature(), "text": Value("string")})
    for split, count in (("train", 5), ("validation", 2)):
        images = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), *map(noise, range(count - 1))]
        part = Dataset.from_dict({"image": images, "text": ["circle"] * count}, features=columns)
        part.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    return tmp_path / "hub"


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_parquet_with_images_inside_is_read_like_a_folder(hub_folder, tokenizer, tmp_path, flag):
    args = DataFlags(**{flag: str(hub_folder)}, resolution="8")
    training, held_out = load_images(args, tokenizer, 0, cache_dir=str(tmp_path / "cache"))
    assert (len(training), len(held_out)) == (5, 2)
    (batch,) = batches(training, last_step=1, micro_batch=5)
    assert batch.pixels[batch.rows.index(0)].min() == 1  # transparent is white
    assert content(batches(training, last_step=1, micro_batch=5, workers=2)[0]) == content(batch)


def test_a_dataset_saved_to_disk_is_read(hub_folder, tokenizer, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(hub_folder), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded, DatasetDict)
    loaded.save_to_disk(str(tmp_path / "saved"))
    args = DataFlags(train_data_dir=str(tmp_path / "saved"), resolution="8")
    training, held_out = load_images(args, tokenizer, 0, cache_dir=str(tmp_path / "cache"))
    assert (len(training), len(held_out)) == (5, 2)


def test_broken_image_inside_a_dataset_is_named_by_its_row(tmp_path, tokenizer):
    stored = [{"bytes": b"no image", "path": None}, {"bytes": b"", "path": None}]
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    part = Dataset.from_dict({"image": stored, "text": ["circle"] * 2}, features=plain)
    part = part.cast_column("image", ImageFeature())
    (tmp_path / "hub").mkdir()
    part.to_parquet(tmp_path / "hub/train.parquet")
    args = DataFlags(train_data_dir=str(tmp_path / "hub"), resolution="8")
    with pytest.raises(DatasetError, match=r"2 images that cannot be read: row 0 .*row 1 "):
        load_images(args, tokenizer, 0, cache_dir=str(tmp_path / "cache"))


def test_dataset_without_a_train_split_lists_the_splits(hub_folder, tokenizer, tmp_path):
    (hub_folder / "data/train-00000-of-00001.parquet").unlink()
    args = DataFlags(train_data_dir=str(hub_folder), resolution="8")
    with pytest.raises(DatasetError, match="no split named train, only validation"):
        load_images(args, tokenizer, 0, cache_dir=str(tmp_path / "cache"))


# Flags


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("64X32", (64, 32))])
def test_resolution_is_a_side_or_height_by_width(text, size):
    args = DataFlags(dataset_name="x", resolution=text)
    assert args.size == size
    assert problems_of(args) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "--train_data_dir"),
        ({"dataset_name": "x", "train_data_dir": "."}, "--train_data_dir and --dataset_name cannot be given together"),
        ({"train_data_dir": "no/such/folder"}, "no such folder"),
        *(({"dataset_name": "x", "resolution": r}, f"--resolution {r} ") for r in ("0", "-8", "8x", "a", "1x2x3")),
        *(({"dataset_name": "x", "random_resized_crop_scale": s}, "--random_resized_crop_scale") for s in (0, 1.1)),
        *(({"dataset_name": "x", "proportion_empty_prompts": s}, "--proportion_empty_prompts") for s in (-0.1, 2)),
        ({"dataset_name": "x", "train_batch_size": 0}, "--train_batch_size 0"),
        ({"dataset_name": "x", "max_train_samples": 0}, "--max_train_samples 0"),
        ({"dataset_name": "x", "dataloader_num_workers": -1}, "--dataloader_num_workers -1"),
    ],
)  # fmt: skip
def test_each_wrong_flag_is_named(flags, named):
    (problem,) = problems_of(DataFlags(**flags))
    assert named in problem
