"""What a run would take of a dataset: errors by code, which rows are trained on, which are held out, at which size."""

import copy
import shutil

import pytest
from PIL import Image

from finetuning.data.checking import read_checked
from finetuning.data.reading import DatasetError


@pytest.fixture
def check(folder, tokenize, data_args):
    """Read a folder with some flags: Checked."""

    def check(seed=0, validation_fraction=0.0, source=folder, resolution="8", **flags):
        args, tokenizer = data_args(source, resolution, **flags), tokenize.tokenizers["text_encoder"]
        return read_checked(args, [tokenizer], seed, validation_fraction, str(folder.parent / "cache"))

    return check


def found(problems):
    """{code: [where, ...]}"""
    return {code: [one.where for one in examples] for code, examples in problems.items() if examples}


def numbers(rows):
    """Which of the images 00.png, 01.png, ... they are."""
    return [int(row.image.stem) for row in rows]


def spoil(folder, index=0):
    """Cut an image in half: its header is sound."""
    path = folder / f"{index:02d}.png"
    path.write_bytes(path.read_bytes()[:200])


# -- errors and warnings ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder, save_noise, write_metadata):
    """One error of each kind beside 7 good rows."""
    spoil(folder)
    (folder / "01.png").write_text("<html>not found</html>")
    captions = {index: "circle" for index in range(11)} | {2: "  "}
    rows = [(f"{index:02d}.png", captions[index]) for index in range(11) if index != 3]
    write_metadata(folder, [*rows, ("gone.png", "circle"), ("../secret.png", "circle")])
    save_noise(folder.parent / "secret.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "cut\n')
    return folder


def test_errors_stop_the_run_or_their_rows_are_left_out(broken, load):
    with pytest.raises(DatasetError) as caught:
        load()
    for text in ("7 errors", "00.png", "gone.png", "--allow_outside_paths", "--on_bad_rows skip"):
        assert text in str(caught.value)
    training, _, message = load(on_bad_rows="skip")
    assert numbers(training.rows) == list(range(4, 11))
    assert "7 left out" in message and "gone.png" in message


@pytest.mark.parametrize(
    ("check_images", "cut", "no_image"), [("full", True, True), ("header", False, True), ("none", False, False)]
)
def test_how_closely_images_are_checked(folder, check, check_images, cut, no_image):
    spoil(folder, 0)
    (folder / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    lines = [f"metadata.jsonl line {line}" for line, is_error in ((1, cut), (2, no_image)) if is_error]
    assert found(check(check_images=check_images).findings.errors).get("unreadable_image", []) == lines


@pytest.mark.parametrize("check_images", ["full", "header"])
def test_animated_images_are_kept_with_a_warning(folder, check, write_metadata, check_images):
    rows = [(f"{index:02d}.png", "circle") for index in range(11)]
    write_metadata(folder, [*rows, ("moving.gif", "star")])
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    checked = check(check_images=check_images)
    assert len(checked.rows) == 12
    assert found(checked.findings.warnings) == {"animated": ["metadata.jsonl line 12"]}


def test_captions_that_are_cut_are_warned_of_with_their_prefix(folder, check, write_metadata):
    # 14 words are read beside the start and the end token; the last caption has 15.
    write_metadata(folder, [(f"{index:02d}.png", "circle " * (index + 5)) for index in range(11)])
    (cut,) = check().findings.warnings["cut_caption"]
    assert (cut.where, cut.reason) == ("metadata.jsonl line 11", "17 tokens")
    assert len(check(caption_prefix="circle " * 20).findings.warnings["cut_caption"]) == 11
    assert not check(max_train_samples=1).findings.warnings


def test_a_caption_is_counted_by_every_tokenizer_and_named_once(folder, write_metadata, tokenize, data_args):
    write_metadata(folder, [(f"{index:02d}.png", "circle " * (index + 5)) for index in range(11)])
    tokenizer = tokenize.tokenizers["text_encoder"]
    shorter = copy.deepcopy(tokenizer)
    shorter.model_max_length = 14
    found = read_checked(
        data_args(folder, "8"), [tokenizer, shorter], 0, 0.0, str(folder.parent / "cache")
    ).findings.warnings["cut_caption"]
    assert [one.where for one in found] == [f"metadata.jsonl line {line}" for line in (11, 9, 10)]


def test_captions_that_keep_an_image_from_being_mirrored_are_counted(folder, check, write_metadata):
    write_metadata(folder, [(f"{index:02d}.png", "left" if index < 5 else "circle") for index in range(11)])
    assert len(check(random_flip=True).findings.warnings["says_a_side"]) == 5
    assert not check(random_flip=True, flip_captions="swap").findings.warnings


def test_errors_of_the_validation_split_count_too(folder, check):
    shutil.copytree(folder, folder / "validation")
    spoil(folder / "validation")
    assert found(check().findings.errors) == {"unreadable_image": ["validation/metadata.jsonl line 1"]}


# -- which rows ------------------------------------------------------------------------------------------------------


def test_max_train_samples_draws_rows_with_the_seed(check):
    chosen = [numbers(check(seed, max_train_samples=4).rows) for seed in range(5)]
    assert all(len(set(one)) == 4 for one in chosen)
    assert chosen[0] == numbers(check(0, max_train_samples=4).rows)
    assert len(set(map(tuple, chosen))) > 1


def test_max_train_samples_above_the_number_of_rows_uses_all_with_a_warning(check):
    checked = check(max_train_samples=12)
    assert len(checked.rows) == 11 and found(checked.findings.warnings) == {"max_train_samples": ["12 of 11"]}
    assert not check(max_train_samples=11).findings.warnings


def test_validation_fraction_holds_out_rows_of_their_own(check):
    splits = [check(seed, 0.25) for seed in range(4)]
    for split in splits:
        assert len(split.held_out) == 3  # 0.25 x 11 = 2.75
        assert sorted(numbers(split.rows) + numbers(split.held_out)) == list(range(11))
    assert len({tuple(numbers(split.held_out)) for split in splits}) > 1
    for again in (check(0, 0.25), check(0, 0.25, max_train_samples=2)):
        assert again.held_out == splits[0].held_out


def test_rows_of_one_image_are_held_out_together(folder, check, write_metadata):
    write_metadata(folder, [(f"{index:02d}.png", text) for index in range(11) for text in ("circle", "square", "star")])
    checked = check(0, 0.25)
    assert len(checked.rows) + len(checked.held_out) == 33
    assert not set(numbers(checked.rows)) & set(numbers(checked.held_out))


def test_a_fraction_that_leaves_nothing_to_train_on_is_an_error(check):
    with pytest.raises(DatasetError, match=r"0\.99"):
        check(0, 0.99)


def test_the_folders_own_validation_split_comes_before_the_fraction(folder, check, write_metadata):
    (folder / "val").mkdir()
    shutil.copy(folder / "00.png", folder / "val/20.png")
    write_metadata(folder / "val", [("20.png", "star")])
    checked = check(0, 0.25)
    assert (len(checked.rows), numbers(checked.held_out)) == (11, [20])


# -- at which size ---------------------------------------------------------------------------------------------------

BUCKETS = [(16, 16), (8, 24), (24, 8), (20, 12)]


@pytest.mark.parametrize("check_images", ["full", "header"])
def test_each_row_gets_the_size_of_its_bucket(load_buckets, check_images):
    training, held_out, message = load_buckets(check_images=check_images)
    assert training.sizes == BUCKETS * 3 and held_out.sizes == BUCKETS
    assert all(f"{height}x{width}: 3" in message for height, width in BUCKETS)


def test_too_small_images_stop_the_run_or_are_left_out(load_buckets):
    with pytest.raises(DatasetError) as caught:
        load_buckets(min_side=16, max_upscale=1)  # 6 training rows and 2 held out have a side of 12
    assert "8 errors" in str(caught.value) and "train/metadata.jsonl line 2 (12x32)" in str(caught.value)
    training, held_out, _ = load_buckets(min_side=16, max_upscale=1, on_bad_rows="skip")
    assert training.sizes == [(16, 16)] * 6 and held_out.sizes == [(16, 16)] * 2
    assert numbers(training.rows) == [0, 3, 4, 7, 8, 11]


# -- datasets with the images inside ---------------------------------------------------------------------------------


def test_images_inside_a_dataset_have_the_size_that_is_shown(tmp_path, check, save_noise, write_parquet):
    for index, size in enumerate([(16, 16), (12, 32)]):
        save_noise(tmp_path / f"{index}.png", size, orientation=6)
    stored = [((tmp_path / f"{index}.png").read_bytes(), "circle") for index in range(2)]
    write_parquet(tmp_path / "hub/train.parquet", stored)
    checked = check(source=tmp_path / "hub", resolution="16", aspect_buckets=True, bucket_step=4)
    assert checked.sizes == BUCKETS[:2] and [row.image for row in checked.rows] == [0, 1]


def test_broken_images_inside_a_dataset_are_named_by_their_row(tmp_path, check, write_parquet):
    write_parquet(tmp_path / "hub/train.parquet", [(content, "circle") for content in (b"no image", b"", None)])
    assert found(check(source=tmp_path / "hub").findings.errors) == {"unreadable_image": ["row 0", "row 1", "row 2"]}


def test_a_dataset_without_a_train_split_lists_the_splits(tmp_path, check, write_parquet):
    write_parquet(tmp_path / "hub/validation.parquet", [(b"no image", "circle")])
    with pytest.raises(DatasetError, match=r"train.*validation"):
        check(source=tmp_path / "hub")
