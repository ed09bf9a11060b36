"""Which tensors of several models belong together, and what to do where they do not."""

from dataclasses import dataclass

from finetuning.families.model_args import ModelError
from finetuning.merging.tensors import Stored

MERGED_PARTS = ("unet", "text_encoder")  # where --parts says nothing: those of these that all models have
SHOWN = 5  # tensors that a message names of each kind


@dataclass(frozen=True)
class Match:
    """One tensor of the result: something made of `inputs`, or a copy of the first."""

    part: str
    key: str
    inputs: tuple[Stored, ...]
    is_copy: bool = False

    @property
    def name(self):
        return f"{self.part}.{self.key}"


def match(sources, parts=None, on_mismatch=None):
    """(matches, notes): every tensor of the first source's parts with its partners in the others.

    sources      the base, then the others, whose tensors follow in that order
    parts        which are merged, the others are the base's (none: the UNet and the text encoder, where all have them)
    on_mismatch  "base" or "tuned" (the first of the others): whose tensor is taken where names or shapes differ, or
                 only one of them has weights there; the base's where tuned has none. None refuses, listing all that
                 differs in one ModelError
    Models that predict different things are refused in any case. Integers and position ids are the base's: an average
    of them is none. They are never a mismatch.
    """
    base, *others = sources
    merged = _merged_parts(sources, parts)
    kinds = {source.prediction_type for source in sources} - {None}
    found, hopeless = [], len(kinds) > 1
    if hopeless:
        found.append(
            "they predict different things ("
            + ", ".join(f"{source.given}: {source.prediction_type}" for source in sources if source.prediction_type)
            + "): between such weights nothing is meaningful"
        )
    matches = []
    for part, own in base.parts.items():
        if part not in merged:
            matches += [Match(part, key, (stored,), is_copy=True) for key, stored in own.items()]
            continue
        of_others = [source.parts[part] for source in others]
        found += [text for source, other in zip(others, of_others, strict=True)
                  for text in _differences(part, own, other, base.given, source.given)]  # fmt: skip
        matches += _matched(part, own, of_others, on_mismatch)
    if hopeless or (found and on_mismatch is None):
        way_out = "" if hopeless else "\n--on_mismatch base or tuned says whose tensors to take there"
        raise ModelError("the models do not fit together:\n  " + "\n  ".join(found) + way_out)
    return matches, [f"--on_mismatch {on_mismatch}: {text}" for text in found]


def _merged_parts(sources, parts):
    if parts is None:
        return [part for part in MERGED_PARTS if all(part in source.parts for source in sources)]
    lacking = [f"{source.given} has no {part}" for part in parts for source in sources if part not in source.parts]
    if lacking:
        raise ModelError(f"--parts {' '.join(parts)}: {'; '.join(lacking)}")
    return list(parts)


def is_copied(key, stored):
    """Whether a tensor is no weight: an integer, or position ids (which some files hold as fp16)."""
    return not stored.dtype.is_floating_point or key.endswith("position_ids")


def _differences(part, own, other, base_name, other_name):
    """Sentences on what one model has and the other has not."""
    missing = [key for key, stored in own.items() if key not in other and not is_copied(key, stored)]
    extra = [key for key, stored in other.items() if key not in own and not is_copied(key, stored)]
    shapes = [
        f"{key} {list(own[key].shape)} and {list(other[key].shape)}"
        for key in own
        if key in other and own[key].shape != other[key].shape and not is_copied(key, own[key])
    ]
    integers = [
        key for key in own
        if key in other and not other[key].dtype.is_floating_point and not is_copied(key, own[key])
    ]  # fmt: skip
    for keys, told in (
        (missing, f"{other_name} lacks"),
        (extra, f"unlike {other_name}, {base_name} lacks"),
        (shapes, f"shapes differ in {other_name},"),
        (integers, f"{other_name} has only integers for"),
    ):
        if keys:
            rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            yield f"{told} {len(keys)} tensor(s) of the {part}: {', '.join(keys[:SHOWN])}{rest}"


def _fits(stored, partner):
    return partner is not None and partner.shape == stored.shape and partner.dtype.is_floating_point


def _matched(part, own, of_others, on_mismatch):
    for key, stored in own.items():
        partners = [other.get(key) for other in of_others]
        from_one_file = all(partner == stored for partner in partners)
        if is_copied(key, stored) or from_one_file:
            yield Match(part, key, (stored,), is_copy=True)
        elif all(_fits(stored, partner) for partner in partners):
            yield Match(part, key, (stored, *partners))
        else:
            taken = partners[0] if on_mismatch == "tuned" and partners[0] is not None else stored
            yield Match(part, key, (taken,), is_copy=True)
    if on_mismatch == "tuned":
        tuned = of_others[0]
        extra = (key for key, stored in tuned.items() if key not in own and not is_copied(key, stored))
        yield from (Match(part, key, (tuned[key],), is_copy=True) for key in extra)
