"""How much of the tuned model goes in: lists of ratios, curves that bend them, and ratios for single blocks.

Blocks are named as the community does, after the original layout of the UNet: IN00 .. IN11, M00, OUT00 .. OUT11 in
SD 1.x and 2.x. What belongs to none of them (time embedding, last convolution, text encoder, VAE) is BASE.
"""

import math
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase

from finetuning.families.model_args import ModelError
from finetuning.families.original import unet_blocks

MOST = 1000  # ratios of one range: each is a whole model


def parse_ratios(words: list[str]) -> list[float]:
    """Ratios of words like "0.3" and "0:1:0.1" (from, to, step), both ends included, in the order they were given.

    Steps are counted in decimals, so that 0:1:0.1 has 0.3 in it and not 0.30000000000000004. Raises ValueError, which
    names every word that is wrong.
    """
    ratios, problems = [], []
    for word in words:
        try:
            ratios += _ratios(word)
        except ValueError as problem:
            problems.append(f"{word}: {problem}")
    twice = sorted({f"{ratio:g}" for ratio in ratios if ratios.count(ratio) > 1})
    if twice:
        problems.append(f"{', '.join(twice)} is there twice: name each ratio once")
    if problems:
        raise ValueError("; ".join(problems))
    return ratios


def _ratios(word):
    numbers = [_decimal(text) for text in word.split(":")]
    if len(numbers) == 1:
        return [float(numbers[0])]
    if len(numbers) != 3:
        raise ValueError("a range is FROM:TO:STEP, e.g. 0:1:0.1")
    first, last, step = numbers
    if not step or (last - first) % step or (last - first) / step < 0:
        raise ValueError(f"steps of {step} do not lead from {first} to {last}: choose one that does")
    steps = int((last - first) / step)
    if steps >= MOST:
        raise ValueError(f"{steps + 1} ratios are too many (at most {MOST}): choose a larger step")
    return [float(first + index * step) for index in range(steps + 1)]


def _decimal(text):
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ValueError("must be a number, or a range FROM:TO:STEP, e.g. 0:1:0.1")
    return number


def inverse_smoothstep(ratio):
    """1/2 - sin(asin(1 - 2 r) / 3), for r in 0..1: undoes smoothstep, so the middle is taken in smaller steps."""
    if ratio in (0, 0.5, 1):
        return ratio  # the sine misses them by a rounding error, and 0 and 1 have to be exact
    return 0.5 - math.sin(math.asin(1 - 2 * ratio) / 3)


CURVES = {
    "linear": lambda ratio: ratio,
    "smoothstep": lambda ratio: ratio * ratio * (3 - 2 * ratio),  # smaller steps at the ends; diffusers' "sigmoid"
    "inverse_smoothstep": inverse_smoothstep,
}


def block_ratios(words, matches):
    """{name: ratio} of the tensors among `matches` that --block_ratios gives one; later words win.

    Raises ModelError where a pattern fits none of them, or there are not as many numbers as blocks in the UNet.
    """
    merged = [one for one in matches if not one.is_copy]
    ratios, unused = {}, []
    for pattern, given in block_rules(words):
        if pattern is None:
            blocks = unet_blocks([one.key for one in merged if one.component == "unet"])
            by_block = _one_for_each(sorted(set(blocks.values()) - {"BASE"}), given)  # IN.., M00, OUT..
            found = {f"unet.{key}": by_block[block] for key, block in blocks.items() if block in by_block}
        else:
            found = dict.fromkeys((one.name for one in merged if fnmatchcase(one.name, pattern)), given[0])
            unused += [] if found else [pattern]
        ratios |= found
    if unused:
        raise ModelError(f"--block_ratios: {', '.join(unused)} matches none of the tensors that are merged")
    return ratios


def block_rules(words: list[str] | None):
    """[(pattern, [ratio]), or (None, [ratio of each block]), ...] of the words of --block_ratios.

    The words are numbers, one for each block of the UNet (25 for SD 1.x and 2.x, 19 for SDXL, apart or in one word with
    commas), and pattern=ratio on full names, "unet.mid_block.*=0.3". Raises ValueError, naming each that is wrong.
    """
    rules, problems = [], []
    for word in words or []:
        pattern, equals, numbers = word.rpartition("=")
        try:
            texts = [numbers] if equals else [text for text in numbers.split(",") if text.strip()]
            given = [float(_decimal(text)) for text in texts]
        except ValueError:
            problems.append(f"{word}: must be numbers, or pattern=ratio as in 'unet.mid_block.*=0.3'")
            continue
        if equals:
            rules.append((pattern, given))
        elif rules and rules[-1][0] is None:
            rules[-1][1].extend(given)
        else:
            rules.append((None, given))
    if problems:
        raise ValueError("; ".join(problems))
    return rules


def _one_for_each(order, given):
    if not order:
        raise ModelError("--block_ratios: numbers are for the UNet's blocks, and no UNet is merged: see --components")
    if len(given) != len(order):
        base = f"; the first of {len(given)} numbers (BASE) is --ratio here" if len(given) == len(order) + 1 else ""
        raise ModelError(
            f"--block_ratios: {len(given)} numbers, but this UNet has {len(order)} blocks "
            f"({order[0]} to {order[-1]}): give a number for each, or pattern=ratio{base}"
        )
    return dict(zip(order, given, strict=True))
