"""Caption text: which words are sides, what a mirrored image is called, which caption a row is trained with."""

import random

import pytest

from finetuning.cli import read
from finetuning.data.captions import CaptionArgs, chosen_caption, names_a_side, shuffle_tags, swap_sides

SIDES = [
    ("a dog on the left of a cat", "a dog on the right of a cat"),
    ("Left: a dog. RIGHT: a cat, right?", "Right: a dog. LEFT: a cat, left?"),
    ("from left to right", "from right to left"),
    (
        "the leftmost and the Rightmost tree, leaning rightwards",
        "the rightmost and the Leftmost tree, leaning leftwards",
    ),
    ("a left-handed man, upper-right corner", "a right-handed man, upper-left corner"),
    ("a lefthand drive", "a righthand drive"),
    ("looking_left, right_hand, camera1_left", "looking_right, left_hand, camera1_right"),
    ("turned leftward", "turned rightward"),
    ("she was left of the house", "she was right of the house"),
    ("he has left arm raised", "he has right arm raised"),
    ("just right of the door", "just left of the door"),
    ("a lamp on the left over a table", "a lamp on the right over a table"),
    ("seen from the right now and then", "seen from the left now and then"),
    ("one goes right away from the other", "one goes left away from the other"),
    ("bright light on the left", "bright light on the right"),
    ("the right answer, all right", "the left answer, all left"),  # in doubt a side
]
OTHERS = [
    "a bright upright copyright sign, outright",
    "a cleft chin, leftovers, leftist, rights and righteous",
    "a dog",
    "",
]


@pytest.mark.parametrize(("text", "mirrored"), SIDES)
def test_sides_are_seen_and_swapped_with_their_case(text, mirrored):
    assert names_a_side(text)
    assert swap_sides(text) == mirrored


@pytest.mark.parametrize("text", OTHERS)
def test_words_that_are_no_sides_are_left_alone(text):
    assert not names_a_side(text)
    assert swap_sides(text) == text


def test_tags_keep_their_separator_and_their_number():
    assert shuffle_tags("a, b", random.Random(0), keep_tokens=9) == "a, b"
    assert shuffle_tags("a dog on a sofa", random.Random(0)) == "a dog on a sofa"


TWO = ("a cat, left, x, y, z", "a dog, right, u, v, w")


def test_without_flags_one_caption_is_drawn_as_it_stands():
    """The first draw after the one of the dropout, as runs have it that know none of these flags."""
    for seed in range(20):
        rng = random.Random(seed)
        assert chosen_caption(TWO, False, CaptionArgs(), rng) == random.Random(seed).choice(TWO)
    assert {chosen_caption(TWO, False, CaptionArgs(), random.Random(seed)) for seed in range(20)} == set(TWO)


def test_order_of_the_tags_does_not_hang_on_how_the_caption_is_chosen():
    same = ("a, b, c, d, e", "a, b, c, d, e")
    by = {
        choice: [
            chosen_caption(same, False, CaptionArgs(caption_choice=choice, shuffle_tags=True), random.Random(seed))
            for seed in range(20)
        ]
        for choice in ("random", "first")
    }
    assert by["random"] == by["first"]
    assert len(set(by["first"])) > 10


def test_prefix_is_neither_shuffled_nor_swapped():
    args = CaptionArgs(caption_prefix="sks left,", shuffle_tags=True, keep_tokens=1, flip_captions="swap")
    texts = [chosen_caption(TWO, True, args, random.Random(seed)) for seed in range(30)]
    assert {text[:15] for text in texts} == {"sks left, a cat", "sks left, a dog"}
    for text in texts:
        assert sorted(text.split(", ")[2:]) == (["right", "x", "y", "z"] if "cat" in text else ["left", "u", "v", "w"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--keep_tokens", "-1", "--shuffle_tags"], "--keep_tokens -1"),
        (["--keep_tokens", "2"], "--shuffle_tags"),
        (["--flip_captions", "turn"], "swap, skip, ignore"),
        (["--caption_choice", "last"], "random, first"),
    ],
)
def test_bad_flags_are_named(flags, named):
    _, problems = read(CaptionArgs, "", flags)
    assert len(problems) == 1 and named in problems[0]
