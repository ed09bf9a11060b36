"""The shapes world: captions say what is drawn, the checker reads what was drawn, the datasets keep the split."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetuning.data.reading import Findings, read_folder
from finetuning.shapes import write_dataset
from finetuning.shapes.checker import agrees, read
from finetuning.shapes.drawing import STYLES, draw, outline, places
from finetuning.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_SHARE,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    draw_scene,
    parse,
    single_scenes,
)

RED_CIRCLE, BLUE_SQUARE = Thing("small", "red", "circle"), Thing("large", "blue", "square")


def scenes(count, seed, **options):
    rng = random.Random(seed)
    return [draw_scene(rng, **options) for _ in range(count)]


# Captions and scenes


def test_captions():
    single = Scene((RED_CIRCLE,), "white")
    pair = Scene((RED_CIRCLE, BLUE_SQUARE), "black", "to the left of")
    assert single.caption == "a small red circle on a white background"
    assert pair.caption == "a small red circle to the left of a large blue square on a black background"


def test_parse_is_the_inverse_of_caption():
    for scene in [*single_scenes(), *scenes(300, 0, pair_share=1.0)]:
        assert parse(scene.caption) == scene
        assert parse(f" {scene.caption}\n") == scene


@pytest.mark.parametrize(
    "caption",
    [
        "", "a cat on a sofa", "a small red circle", "a small red circle on a white background, chalk drawing",
        "a tiny red circle on a white background", "a small mauve circle on a white background",
        "a small red hexagon on a white background", "a small red circle on a brown background",
        "a small red circle near a large blue square on a white background",
    ],
)  # fmt: skip
def test_parse_refuses_what_is_not_of_this_world(caption):
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        parse(caption)


def test_single_scenes_are_all_there_once():
    every = list(single_scenes())
    assert len(every) == len(set(every)) == 2 * 6 * 6 * 4
    assert len(list(single_scenes(("circle",)))) == 2 * 6 * 4


def test_held_out_share_of_the_scenes():
    held_out = np.mean([scene.is_held_out for scene in single_scenes()])
    assert held_out == pytest.approx(HELD_OUT_SHARE, abs=0.13)  # five deviations of 288 draws
    assert np.mean([s.is_held_out for s in scenes(50, 0, held_out=True)]) == 1
    assert np.mean([s.is_held_out for s in scenes(50, 0, held_out=False)]) == 0


def test_random_scenes_hold_what_was_asked_for():
    assert {len(scene.things) for scene in scenes(50, 0, pair_share=0)} == {1}
    pairs = scenes(200, 0, pair_share=1, shapes=("star", "cross"))
    assert {len(scene.things) for scene in pairs} == {2}
    assert {thing.shape for scene in pairs for thing in scene.things} == {"star", "cross"}
    assert {scene.relation for scene in pairs} == set(RELATIONS)
    assert {scene.relation for scene in scenes(50, 0, pair_share=0)} == {None}
    assert 60 < sum(len(scene.things) == 2 for scene in scenes(200, 1, pair_share=0.5)) < 140


# Drawing


@pytest.mark.parametrize("style", STYLES)
def test_a_seed_draws_one_image(style):
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "white", "above")
    assert draw(scene, 1, style).tobytes() == draw(scene, 1, style).tobytes() != draw(scene, 2, style).tobytes()
    assert (draw(scene, 1, style).size, draw(scene, 1, style).mode) == ((SIDE, SIDE), "RGB")


def test_filled_shape_has_its_colour_and_its_background():
    for background, color in (("pink", "green"), ("black", "orange")):
        scene = Scene((Thing("large", color, "square"),), background)
        pixels = np.asarray(draw(scene, 0)).reshape(-1, 3)
        # A square of 1.8 x 15 pixels: about 729 of 4096, but for the mixed pixels of its edge.
        assert 25**2 <= (pixels == COLORS[color]).all(1).sum() <= 28**2
        assert (pixels == BACKGROUNDS[background]).all(1).sum() >= 4096 - 29**2


def test_unknown_shapes_and_styles_are_named():
    with pytest.raises(ValueError, match="hexagon"):
        outline("hexagon", 0, 0, 1)
    with pytest.raises(ValueError, match="unknown style 'oil'; there are filled, chalk"):
        draw(Scene((RED_CIRCLE,), "white"), 0, "oil")


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_stay_in_their_box(shape):
    corners = np.array(outline(shape, 30, 20, 10))
    assert (np.abs(corners - (30, 20)) <= 10 + 1e-9).all()
    assert (np.ptp(corners, axis=0) >= 17).all()


def test_things_stand_inside_apart_and_as_the_relation_says():
    for seed, scene in enumerate(scenes(300, 2, pair_share=1.0)):
        (ax, ay), (bx, by) = places(scene, random.Random(seed))
        first, second = (RADII[thing.size] for thing in scene.things)
        for x, y, radius in ((ax, ay, first), (bx, by, second)):
            assert radius <= min(x, y)
            assert max(x, y) <= SIDE - radius
        dx, dy = bx - ax, by - ay
        along = {"above": dy, "below": -dy, "to the left of": dx, "to the right of": -dx}[scene.relation]
        assert along >= first + second + 1
        assert along > min(abs(dx), abs(dy))


# The checker, against images whose truth is known


@pytest.mark.parametrize("style", STYLES)
def test_checker_reads_single_shapes_right(style):
    every = list(single_scenes())
    right = [agrees(scene, draw(scene, seed, style)) for seed, scene in enumerate(every)]
    for part in ("shape", "color", "size", "background", "count"):
        assert np.mean([one[part] for one in right]) >= 0.99, part
    assert np.mean([one["all"] for one in right]) >= 0.99


@pytest.mark.parametrize("style", STYLES)
def test_checker_reads_mixed_scenes_right(style):
    right = [agrees(scene, draw(scene, seed, style)) for seed, scene in enumerate(scenes(300, 3, pair_share=0.7))]
    for part in ("shape", "color", "size", "background", "count", "axis", "relation", "all"):
        assert np.mean([one[part] for one in right]) >= 0.99, part


def other(value, choices):
    return next(choice for choice in choices if choice != value)


def test_checker_notices_each_thing_that_is_wrong():
    """The same images, asked about with one word changed: that part is wrong and the others are not."""
    for seed, scene in enumerate(list(single_scenes())[::7]):
        image, (thing,) = draw(scene, seed), scene.things
        changed = {
            "shape": replace(scene, things=(replace(thing, shape=other(thing.shape, SHAPES)),)),
            "color": replace(scene, things=(replace(thing, color=other(thing.color, COLORS)),)),
            "size": replace(scene, things=(replace(thing, size=other(thing.size, RADII)),)),
            "background": replace(scene, background=other(scene.background, BACKGROUNDS)),
        }
        for part, asked in changed.items():
            right = agrees(asked, image)
            assert {name for name, value in right.items() if not value} == {part, "all"}


@pytest.mark.parametrize("relation", RELATIONS)
def test_checker_notices_a_wrong_relation(relation):
    image = draw(Scene((RED_CIRCLE, BLUE_SQUARE), "white", relation), 0)
    for asked in RELATIONS:
        right = agrees(Scene((RED_CIRCLE, BLUE_SQUARE), "white", asked), image)
        assert right["relation"] == right["all"] == (asked == relation)
        assert right["axis"] == ((asked in ("above", "below")) == (relation in ("above", "below")))
    swapped = agrees(Scene((BLUE_SQUARE, RED_CIRCLE), "white", relation), image)
    assert swapped["axis"] and not swapped["relation"]
    assert swapped["shape"] and swapped["color"] and swapped["size"]


def test_checker_notices_a_missing_and_a_surplus_thing():
    pair, single = Scene((RED_CIRCLE, BLUE_SQUARE), "white", "above"), Scene((BLUE_SQUARE,), "white")
    missing = agrees(pair, draw(single, 0))
    assert not any(missing[part] for part in ("count", "shape", "color", "size", "relation", "all"))
    surplus = agrees(single, draw(pair, 0))
    assert {part for part, right in surplus.items() if not right} == {"count", "all"}


def test_checker_finds_nothing_on_a_plain_image():
    assert read(Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["gray"])) == ("gray", [])
    right = agrees(Scene((RED_CIRCLE,), "gray"), Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["gray"]))
    assert {part for part, value in right.items() if value} == {"background", "axis", "relation"}


def test_checker_rejects_noise():
    for seed, scene in enumerate(scenes(50, 5)):
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        assert not agrees(scene, Image.fromarray(noise))["all"]


def test_checker_reads_enlarged_and_slightly_noisy_images():
    """A model's images are neither sharp nor clean."""
    rng = np.random.default_rng(0)
    right = []
    for seed, scene in enumerate(scenes(100, 6, pair_share=0.5)):
        large = draw(scene, seed).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
        dirty = np.clip(np.asarray(large) + rng.normal(0, 8, (2 * SIDE, 2 * SIDE, 3)), 0, 255).astype(np.uint8)
        right.append(agrees(scene, Image.fromarray(dirty))["all"])
    assert np.mean(right) >= 0.98


# Datasets


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Run the command as a user does; the folder it wrote."""

    def write(name, *flags):
        monkeypatch.setattr("sys.argv", ["write_dataset", "--output", str(tmp_path / name), *map(str, flags)])
        write_dataset.main()
        return tmp_path / name

    return write


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def captions(folder, split):
    rows = read_folder(folder, split, "image", "text", False, Findings())
    return [text for row in rows for text in row.captions]


@pytest.mark.parametrize("style", STYLES)
def test_same_command_gives_the_same_bytes(write, style):
    flags = ("--style", style, "--train", 20, "--validation", 5)
    first = contents(write("first", *flags))
    assert len(first) == 20 + 5 + 2
    assert contents(write("second", *flags)) == first
    assert contents(write("third", *flags, "--seed", 1)) != first


def test_held_out_combinations_are_in_validation_and_never_in_train(write):
    folder = write("data", "--train", 150, "--validation", 50)
    train, validation = captions(folder, "train"), captions(folder, "validation")
    assert (len(train), len(validation)) == (150, 50)
    assert not any(parse(caption).is_held_out for caption in train)
    assert all(parse(caption).is_held_out for caption in validation)


def test_left_out_shapes_appear_nowhere(write):
    folder = write("data", "--train", 60, "--validation", 30, "--leave_out", "cross", "star")
    shapes = {
        thing.shape
        for split in ("train", "validation")
        for text in captions(folder, split)
        for thing in parse(text).things
    }
    assert shapes == {"circle", "square", "triangle", "diamond"}


def test_images_show_what_their_captions_say(write):
    folder = write("data", "--train", 40, "--style", "chalk", "--pair_share", 0.5)
    rows = read_folder(folder, "train", "image", "text", False, Findings())
    right = [agrees(parse(row.captions[0]), Image.open(row.image))["all"] for row in rows]
    assert sum(right) >= 39


def test_without_validation_no_folder_is_written(write):
    folder = write("data", "--train", 3, "--pair_share", 0)
    assert [path.name for path in folder.iterdir()] == ["train"]
    assert all(len(parse(caption).things) == 1 for caption in captions(folder, "train"))


def test_shipped_datasets_keep_the_split(root):
    for name in ("shapes", "chalk"):
        assert not any(parse(caption).is_held_out for caption in captions(root / "datasets" / name, "train"))
        assert all(parse(caption).is_held_out for caption in captions(root / "datasets" / name, "validation"))
