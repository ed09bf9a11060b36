"""Which tensors of several models belong together, and what to do where they do not."""

from dataclasses import dataclass

from finetuning.cli import first_few
from finetuning.families.model_args import ModelError
from finetuning.families.tensors import TensorReference


@dataclass(frozen=True)
class Match:
    """One tensor of the result: something made of `inputs`, or a copy of the first."""

    component: str
    key: str
    inputs: tuple[TensorReference, ...]
    is_copy: bool = False

    @property
    def name(self):
        return f"{self.component}.{self.key}"


def match(sources, components=None, on_mismatch=None):
    """(matches, warnings): every tensor of the first source's components with its partners in the others.

    sources      the base, then the others, whose tensors follow in that order
    components   which are merged, the others are the base's (none: the UNet and the text encoder, where all have them)
    on_mismatch  "base" or "tuned" (the first of the others): whose tensor is taken where names or shapes differ, or
                 only one of them has weights there; the base's where tuned has none. None refuses, listing all that
                 differs in one ModelError
    Models that predict different things are refused in any case. Integers and position ids are the base's: an average
    of them is none. They are never a mismatch.
    """
    base, *others = sources
    kinds = {source.prediction_type for source in sources} - {None}
    found, hopeless = [], len(kinds) > 1
    if hopeless:
        found.append(
            "they predict different things ("
            + ", ".join(f"{source.given}: {source.prediction_type}" for source in sources if source.prediction_type)
            + "): between such weights nothing is meaningful"
        )
    if any(source.family is not base.family for source in others):
        hopeless = True
        found.append(
            "they are of different kinds (" + ", ".join(f"{one.given}: {one.class_name}" for one in sources) + ")"
        )
    if hopeless:
        raise ModelError("the models do not fit together:\n  " + "\n  ".join(found))
    merged, matches = _merged_components(sources, components), []
    for component, own in base.tensors.items():
        if component not in merged:
            matches += [Match(component, key, (reference,), is_copy=True) for key, reference in own.items()]
            continue
        of_others = [source.tensors[component] for source in others]
        found += [text for source, other in zip(others, of_others, strict=True)
                  for text in _differences(component, own, other, base.given, source.given)]  # fmt: skip
        matches += _matched(component, own, of_others, on_mismatch)
    if found and on_mismatch is None:
        way_out = "\n--on_mismatch base or tuned says whose tensors to take there"
        raise ModelError("the models do not fit together:\n  " + "\n  ".join(found) + way_out)
    return matches, [f"--on_mismatch {on_mismatch}: {text}" for text in found]


def _merged_components(sources, components):
    if components is None:
        names = [one.name for one in sources[0].family.components if one.name != "vae"]
        return [name for name in names if all(name in source.components for source in sources)]
    lacking = [
        f"{source.given} has no {name}" for name in components for source in sources if name not in source.components
    ]
    if lacking:
        raise ModelError(f"--components {' '.join(components)}: {'; '.join(lacking)}")
    return list(components)


def is_copied(key, reference):
    """Whether a tensor is no weight: an integer, or position ids (which some files hold as fp16)."""
    return not reference.dtype.is_floating_point or key.endswith("position_ids")


def _differences(component, own, other, base_name, other_name):
    """Sentences on what one model has and the other has not."""
    missing = [key for key, reference in own.items() if key not in other and not is_copied(key, reference)]
    extra = [key for key, reference in other.items() if key not in own and not is_copied(key, reference)]
    shapes = [
        f"{key} {list(own[key].shape)} and {list(other[key].shape)}"
        for key in own
        if key in other and own[key].shape != other[key].shape and not is_copied(key, own[key])
    ]
    integers = [
        key for key in own
        if key in other and not other[key].dtype.is_floating_point and not is_copied(key, own[key])
    ]  # fmt: skip
    for keys, what in (
        (missing, f"{other_name} lacks"),
        (extra, f"unlike {other_name}, {base_name} lacks"),
        (shapes, f"shapes differ in {other_name},"),
        (integers, f"{other_name} has only integers for"),
    ):
        if keys:
            yield f"{what} {len(keys)} tensor(s) of the {component}: {first_few(keys)}"


def _fits(reference, partner):
    return partner is not None and partner.shape == reference.shape and partner.dtype.is_floating_point


def _matched(component, own, of_others, on_mismatch):
    for key, reference in own.items():
        partners = [other.get(key) for other in of_others]
        from_one_file = all(partner == reference for partner in partners)
        if is_copied(key, reference) or from_one_file:
            yield Match(component, key, (reference,), is_copy=True)
        elif all(_fits(reference, partner) for partner in partners):
            yield Match(component, key, (reference, *partners))
        else:
            taken = partners[0] if on_mismatch == "tuned" and partners[0] is not None else reference
            yield Match(component, key, (taken,), is_copy=True)
    if on_mismatch == "tuned":
        tuned = of_others[0]
        extra = (key for key, reference in tuned.items() if key not in own and not is_copied(key, reference))
        yield from (Match(component, key, (tuned[key],), is_copy=True) for key in extra)
