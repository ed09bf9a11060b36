"""From the dataset flags to batches that are functions of their place: captions, tokens, pixels, sizes."""

import pickle
import shutil

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from finetuning.data.batch_sampler import BatchSampler, SampleIndex
from finetuning.data.reading import DatasetError
from finetuning.data.rows import Row, Rows
from finetuning.data.training_set import DataArgs, ImageDataset, _leave_signals_to_the_run
from finetuning.data.transforms import Transform


def batches(images, first_step=0, last_step=5, workers=0, process=0, **layout):
    layout = {"micro_batch": 4, "accumulation": 1, "processes": 1} | layout
    sampler = BatchSampler(rows=len(images), process=process, seed=0, **layout)
    return list(images.loader(sampler, first_step, last_step, workers))


def content(batch):
    """Everything in a batch, ready to compare."""
    tensors = tuple(t.numpy().tobytes() for t in (batch.pixels, *batch.tokens.values(), batch.sizes, batch.weights))
    return (*tensors, batch.captions, batch.rows, batch.step, batch.epoch, batch.ends_step)


def index(row, epoch=0):
    return SampleIndex(row, epoch, 0, 1.0, True)


# -- captions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(data_args):
    """An ImageDataset of captions alone."""

    def captioned(captions, dropout=0.0, seed=0, random_flip=False, **flags):
        rows = Rows.of(Row(number, texts, f"row {number}") for number, texts in enumerate(captions))
        transform = Transform(8, 8, True, random_flip, "box", None, seed)
        args = data_args("unused", proportion_empty_prompts=dropout, **flags)
        return ImageDataset(rows, None, [(8, 8)] * len(rows), transform, None, args, seed)

    return captioned


def drawn(images, epoch=0):
    """The caption that each row is trained with."""
    flips = (images.is_mirrored(number, epoch) for number in range(len(images)))
    return [images.caption(images.rows[number], epoch, number, flip) for number, flip in enumerate(flips)]


def test_captions_are_dropped_as_often_as_asked_as_a_function_of_seed_epoch_and_row(captioned):
    many = [("circle",)] * 2000
    once = drawn(captioned(many, 0.1))
    assert 133 < once.count("") < 267  # 200, five deviations of a binomial
    assert [drawn(captioned(many[:100], share)).count("") for share in (0.0, 1.0)] == [0, 100]
    assert once == drawn(captioned(many, 0.1))
    assert once not in (drawn(captioned(many, 0.1), epoch=1), drawn(captioned(many, 0.1, seed=1)))


def test_the_prefix_of_the_metadata_is_the_flags_and_the_captions_own(captioned):
    rows = [("my dog on grass",), ("my dog in water", "my dog"), ("my dog asleep",)]
    assert captioned(rows).caption_prefix() == "my dog"
    assert captioned(rows, caption_prefix="sks,").caption_prefix() == "sks, my dog"
    assert captioned([("a cat",), ("my dog",)]).caption_prefix() == ""


def test_tags_are_shuffled_anew_each_epoch_but_the_first_stay(captioned):
    tagged = captioned([("sks, a, b, c, d",)] * 20, shuffle_tags=True, keep_tokens=1)
    epochs = [drawn(tagged, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1] and epochs[0] == drawn(tagged, 0)
    assert all(sorted(text.split(", ")) == ["a", "b", "c", "d", "sks"] for text in epochs[0])
    assert all(text.startswith("sks, ") for epoch in epochs for text in epoch)


def test_each_of_several_captions_is_drawn_as_often_or_the_first_alone(captioned):
    texts = ("one", "two", "three")
    found = drawn(captioned([texts] * 900))
    assert [found.count(text) for text in texts] == pytest.approx([300] * 3, abs=71)
    assert set(drawn(captioned([texts] * 30, caption_choice="first"))) == {"one"}


@pytest.mark.parametrize(
    ("flip_captions", "mirrored", "texts"),
    [
        ("skip", {1}, {"a cat to the left", "a cat"}),
        ("swap", {0, 1}, {"a cat to the left", "a cat to the right", "a cat"}),
        ("ignore", {0, 1}, {"a cat to the left", "a cat"}),
    ],
)
def test_a_caption_that_names_a_side_is_not_wrong_after_mirroring(captioned, flip_captions, mirrored, texts):
    images = captioned([("a cat to the left", "a cat"), ("a cat",)] * 20, random_flip=True, flip_captions=flip_captions)
    found = {(row % 2, images.is_mirrored(row, epoch), text)
             for epoch in range(3) for row, text in enumerate(drawn(images, epoch))}  # fmt: skip
    assert {row for row, flip, _ in found if flip} == mirrored
    assert {text for *_, text in found} == texts
    if flip_captions == "swap":
        assert not found & {(0, True, "a cat to the left"), (0, False, "a cat to the right")}


# -- images ----------------------------------------------------------------------------------------------------------


def test_flags_reach_the_images_and_captions(load):
    training, _, _ = load(
        seed=3, proportion_empty_prompts=1.0, center_crop=True, random_flip=True, image_interpolation_mode="box",
        random_resized_crop_scale=0.4,
    )  # fmt: skip
    assert training.transform == Transform(8, 8, True, True, "box", 0.4, 3)
    assert set(drawn(training)) == {""}
    assert load()[0].transform == Transform(8, 8, False, False, "lanczos", None, 0)


def test_held_out_images_are_neither_cropped_nor_flipped_nor_stripped_of_captions_at_random(load):
    _, held_out, _ = load(0, 0.5, random_flip=True, random_resized_crop_scale=0.3, proportion_empty_prompts=1.0)
    for row in range(len(held_out)):
        found = [held_out[index(row, epoch)] for epoch in range(6)]
        assert all(torch.equal(found[0][1], pixels) for _, pixels, _, _ in found)
        assert {caption for *_, caption in found} == {held_out.rows[row].captions[0]}


def test_pixels_are_mirrored_where_the_caption_allows_it(folder, load, write_metadata):
    write_metadata(folder, [(f"{row:02d}.png", "left" if row < 5 else "circle") for row in range(11)])
    mirrored, plain = load(random_flip=True, center_crop=True)[0], load(center_crop=True)[0]
    places = [index(row, epoch) for row in range(11) for epoch in range(4)]
    for place in places:
        flipped = torch.equal(mirrored[place][1], plain[place][1].flip(-1))
        assert flipped == mirrored.is_mirrored(place.row, place.epoch)
    assert {place.row for place in places if mirrored.is_mirrored(place.row, place.epoch)} <= set(range(5, 11))


# -- prior preservation ----------------------------------------------------------------------------------------------


@pytest.fixture
def prior(tmp_path, save_noise, write_metadata):
    """3 images of what must not be forgotten, as `prepare_dataset.py convert` writes them, and one held out."""
    for split, count in (("train", 3), ("validation", 1)):
        (tmp_path / "prior" / split).mkdir(parents=True)
        for number in range(count):
            save_noise(tmp_path / f"prior/{split}/{number}.png", seed=50 + number)
        write_metadata(tmp_path / "prior" / split, [(f"{number}.png", "a star") for number in range(count)])
    return tmp_path / "prior"


def test_prior_rows_are_trained_on_besides_and_weigh_what_the_flag_says(prior, load):
    flags = {"prior_data_dir": str(prior), "prior_loss_weight": 0.25, "max_train_samples": 5}
    training, held_out, _ = load(0, 0.2, **flags)
    assert [row.is_prior for row in training.rows] == [False] * 5 + [True] * 3
    assert held_out and not any(row.is_prior for row in held_out.rows)
    assert training.summary() == "8 rows, 3 of them of --prior_data_dir"
    sampler = BatchSampler(rows=8, micro_batch=8, accumulation=1, processes=1, process=0, seed=0)
    [batch] = training.loader(sampler, 0, 1, workers=0)
    weights = dict(zip(batch.rows, batch.weights.tolist(), strict=True))
    assert weights == {row: 1 / 8 if row < 5 else 1 / 32 for row in range(8)}
    assert {text for row, text in zip(batch.rows, batch.captions, strict=True) if row >= 5} == {"a star"}
    # A word that is there to be learned is not the prior's
    assert training.caption_prefix().startswith("circle") and load()[0].fingerprint() != training.fingerprint()


def test_what_is_wrong_with_prior_images_is_named_with_all_the_rest(prior, folder, load):
    (folder / "03.png").write_bytes(b"no image")
    (prior / "train/1.png").write_bytes(b"no image")
    (prior / "train/more.png").write_bytes(b"no image")
    with pytest.raises(DatasetError) as caught:
        load(prior_data_dir=str(prior))
    assert "3 errors" in str(caught.value)
    assert all(f"{prior}: {name}" in str(caught.value) for name in ("train/more.png", "train/metadata.jsonl line 2"))
    assert len(load(prior_data_dir=str(prior), on_bad_rows="skip")[0]) == 12


def test_unchecked_images_are_named_when_their_turn_comes(folder, load):
    (folder / "03.png").write_bytes(b"no image")
    training = load(check_images="none")[0]
    assert len(training) == 11 and training.image(2).size == (12, 12)
    with pytest.raises(DatasetError, match=r"metadata.jsonl line 4: .*03\.png.*--check_images full"):
        training.image(3)


def test_fingerprint_changes_with_captions_rows_and_their_order_but_not_with_the_place(folder, load, write_metadata):
    whole = load()[0].fingerprint()
    assert load(seed=5)[0].fingerprint() == whole
    moved = shutil.copytree(folder, folder.parent / "moved")
    training = load(source=moved)[0]
    assert training.fingerprint() == whole
    training.rows = training.rows[::-1]
    assert training.fingerprint() != whole
    assert load(max_train_samples=10)[0].fingerprint() != whole
    write_metadata(folder, [(f"{row:02d}.png", "circle " * (row + 1) if row < 10 else "star") for row in range(11)])
    assert load()[0].fingerprint() != whole


def test_fingerprint_changes_with_the_buckets_but_not_where_all_are_square(load, load_buckets):
    plain = {"aspect_buckets": False, "bucket_step": 64, "min_side": None}
    found = [load_buckets(**flags)[0].fingerprint() for flags in (plain, {}, {"bucket_step": 8}, {"bucket_step": 8})]
    assert len(set(found[:3])) == 3 and found[2] == found[3]
    assert load(aspect_buckets=True, bucket_step=4)[0].fingerprint() == load()[0].fingerprint()


# -- batches ---------------------------------------------------------------------------------------------------------

RANDOM = {"random_flip": True, "random_resized_crop_scale": 0.5, "proportion_empty_prompts": 0.3}


def test_a_batch_holds_what_its_places_say(load, tokenize):
    training, _, _ = load(proportion_empty_prompts=0.3, random_flip=True)
    first, second, third = batches(training, last_step=3)
    assert [len(batch.rows) for batch in (first, second, third)] == [4, 4, 3]
    assert (first.pixels.shape, first.pixels.dtype) == ((4, 3, 8, 8), torch.float32)
    assert first.tokens["text_encoder"].tolist() == tokenize(first.captions)["text_encoder"].tolist()
    assert (first.weights.tolist(), third.weights.tolist()) == ([0.25] * 4, pytest.approx([1 / 3] * 3))
    assert (third.step, third.epoch, third.ends_step) == (2, 0, True)
    for position, row in enumerate(first.rows):
        draw = training.transform.draw(0, row)
        pixels, sizes = training.transform.apply(training.image(row), draw)
        assert torch.equal(first.pixels[position], pixels) and first.sizes[position].tolist() == list(sizes)
        assert first.captions[position] == training.caption(training.rows[row], 0, row, draw.flip)
    assert len({caption == "" for batch in (first, second, third) for caption in batch.captions}) == 2


def test_black_and_white_become_minus_one_and_one(folder, load):
    for number in range(11):
        Image.new("L", (8, 8), 255 * (number % 2)).save(folder / f"{number:02d}.png")
    for batch in batches(load()[0]):
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            assert torch.equal(pixels, torch.full((3, 8, 8), 2.0 * (row % 2) - 1))


def test_two_workers_give_the_batches_of_none_and_a_resumed_run_its_tail(load):
    training, _, _ = load(**RANDOM)
    whole = [content(batch) for batch in batches(training, 0, 6)]
    assert len(set(map(str, whole))) == 6
    assert [content(batch) for batch in batches(training, 0, 6, workers=2)] == whole
    for start in range(6):
        assert [content(batch) for batch in batches(training, start, 6)] == whole[start:]


def test_what_a_spawned_worker_gets_is_picklable(load):
    """Python 3.14 no longer forks by default; Windows and macOS never did."""
    training, _, _ = load(**RANDOM)
    again, collate, _ = pickle.loads(pickle.dumps((training, training.collate, _leave_signals_to_the_run)))
    indices = next(BatchSampler(11, 4, 1, 1, 0, seed=0).micro_batches(0, 1))
    assert content(collate([again[one] for one in indices])) == content(batches(training, last_step=1)[0])


@pytest.mark.parametrize(
    "layout", [{"micro_batch": 2, "processes": 2}, {"micro_batch": 1, "accumulation": 4}], ids=["2 x 2", "4 of 1"]
)
def test_layouts_of_one_global_batch_see_the_same_pixels_and_captions(load, layout):
    training, _, _ = load(**RANDOM)

    def seen(**layout):
        found = {}
        for process in range(layout.get("processes", 1)):
            for batch in batches(training, process=process, **layout):
                for row, *one in zip(batch.rows, batch.pixels, batch.captions, batch.sizes.tolist(), strict=True):
                    found[batch.step, row] = (one[0].numpy().tobytes(), *one[1:])
        return found

    assert seen(**layout) == seen(micro_batch=4)


def test_batches_move_to_a_device_whole(load):
    batch = batches(load()[0], last_step=1)[0]
    moved = batch.to("meta")
    tensors = (moved.pixels, moved.sizes, moved.weights, *moved.tokens.values())
    assert len(tensors) == 4 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.captions, moved.rows, moved.step) == (batch.captions, batch.rows, batch.step)


# -- buckets ---------------------------------------------------------------------------------------------------------


def test_batches_of_buckets_are_of_one_size_and_functions_of_their_place(load_buckets):
    training, _, _ = load_buckets(random_flip=True)
    sampler = BatchSampler(12, 2, 1, 1, 0, seed=0, buckets=training.sizes)
    assert sampler.steps_per_epoch == 8
    whole = list(training.loader(sampler, 0, 10, 0))
    assert [content(batch) for batch in training.loader(sampler, 3, 10, 2)] == list(map(content, whole[3:]))
    for batch in whole:
        [size] = {training.sizes[row] for row in batch.rows}
        assert batch.pixels.shape == (len(batch.rows), 3, *size)
        assert batch.sizes[:, 4:].tolist() == [[*size]] * len(batch.rows)


# -- datasets with the images inside ---------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path):
    """A folder of parquet files as the Hub has them, train and validation, its first image transparent."""
    columns = Features({"image": ImageFeature(), "text": Value("string")})
    for split, count in (("train", 5), ("validation", 2)):
        images = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), *(Image.new("RGB", (12, 12), "red") for _ in range(count))]
        part = Dataset.from_dict({"image": images[:count], "text": ["circle"] * count}, features=columns)
        part.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    return tmp_path / "hub"


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_parquet_with_images_inside_is_read_like_a_folder(hub_folder, load, flag):
    source = {"source": hub_folder} if flag == "train_data_dir" else {"source": None, "dataset_name": str(hub_folder)}
    training, held_out, _ = load(**source)
    assert (len(training), len(held_out)) == (5, 2)
    (batch,) = batches(training, last_step=1, micro_batch=5)
    assert batch.pixels[batch.rows.index(0)].min() == 1  # transparent is white
    assert content(batches(training, last_step=1, micro_batch=5, workers=2)[0]) == content(batch)
    again = pickle.loads(pickle.dumps(training))
    assert content(batches(again, last_step=1, micro_batch=5)[0]) == content(batch)


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("64X32", (64, 32))])
def test_resolution_is_a_side_or_height_by_width(data_args, text, size):
    args = data_args(None, text, dataset_name="x")
    assert args.size == size
    assert list(DataArgs.problems(args)) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"dataset_name": None}, "--train_data_dir"),
        ({"source": "no/such/folder"}, "no/such/folder"),
        *(({"resolution": text}, f"--resolution {text} ") for text in ("0", "-8", "8x", "a", "1x2x3")),
    ],
)
def test_each_wrong_flag_is_named(data_args, flags, named):
    (problem,) = DataArgs.problems(data_args(**({"source": None, "dataset_name": "x"} | flags)))
    assert named in problem
