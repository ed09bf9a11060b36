"""Caption text: words of direction in mirrored images, tags, prefixes, and which caption a row is trained with.

"left" and "right" are sides wherever they stand by themselves, joined by a hyphen or an underscore (left-hand,
upper_right) or with an ending (rightmost, leftwards); not inside other words (bright, upright, cleft, leftovers). "All
right" counts as a side too: at worst an image is then not mirrored that might have been. English alone.
"""

import re
from dataclasses import dataclass

from finetuning.cli import flag

_SIDE = re.compile(r"(?<![^\W\d_])(left|right)(?=(?:most|wards?|hand(?:ed)?|side)?(?![^\W\d_]))", re.IGNORECASE)


@dataclass
class MirrorArgs:
    """Mirrored images"""

    flip_captions: str = flag(
        "skip", "where a mirrored image's caption says left or right: swap them, skip the mirroring, or ignore it",
        choices=("swap", "skip", "ignore"),
    )  # fmt: skip


@dataclass
class CaptionArgs(MirrorArgs):
    """Captions"""

    caption_prefix: str = flag("", 'words put before every caption that is not dropped, as "interior design,"')
    caption_choice: str = flag(
        "random", "of several captions, train on a random one each epoch or on the first", choices=("random", "first")
    )
    shuffle_tags: bool = flag(False, "put the tags of a caption, between commas, in a new order each epoch")
    keep_tokens: int = flag(0, "how many tags stay in front (kohya's name for it)", min=0, requires="shuffle_tags")


def origin_column(caption_column):
    """The metadata key that says where a row's caption, or each of its captions, comes from."""
    return f"{caption_column}_origin"


def chosen_caption(captions, flipped, args: CaptionArgs, rng):
    """The text that a row with these captions is trained with; `flipped`: its image is mirrored this time.

    Takes from `rng` (random.Random) first the choice, which is drawn under every setting, then the order of the tags.
    """
    drawn = rng.choice(captions)
    text = drawn if args.caption_choice == "random" else captions[0]
    if flipped and args.flip_captions == "swap":
        text = swap_sides(text)
    if args.shuffle_tags:
        text = shuffle_tags(text, rng, args.keep_tokens)
    return with_prefix(text, args.caption_prefix)


def possible_captions(captions, may_flip, args: CaptionArgs):
    """All that `chosen_caption` can give, as a set; not with --shuffle_tags, whose orders are too many."""
    texts = captions if args.caption_choice == "random" else captions[:1]
    swapped = map(swap_sides, texts) if may_flip and args.flip_captions == "swap" else ()
    return {with_prefix(text, args.caption_prefix) for text in (*texts, *swapped)}


def may_mirror(captions, flip_captions):
    """Whether an image with these captions can be mirrored under --flip_captions, whichever of them is chosen."""
    return flip_captions != "skip" or not any(map(names_a_side, captions))


def names_a_side(text):
    """Whether a text says left or right; when in doubt, yes."""
    return _SIDE.search(text) is not None


def swap_sides(text):
    """left <-> right wherever `names_a_side` sees one, with the case of each word kept."""
    return _SIDE.sub(lambda match: _opposite(match[0]), text)


def _opposite(side):
    other = {"left": "right", "right": "left"}[side.lower()]
    return other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other


def shuffle_tags(text, rng, keep_tokens=0):
    """The tags in an order drawn from `rng` (random.Random); the first `keep_tokens` stay. Empty tags go."""
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    kept, loose = tags[:keep_tokens], tags[keep_tokens:]
    rng.shuffle(loose)
    return ", ".join(kept + loose)


def with_prefix(text, prefix):
    """`prefix`, one space and the text; the one that is there where the other is empty."""
    return f"{prefix.rstrip()} {text.lstrip()}".strip() if prefix else text
