"""Which tensors of several models belong together, and what to do where they do not."""

from dataclasses import dataclass

from finetuning.cli import first_few
from finetuning.families.model_args import ModelError
from finetuning.families.tensors import TensorReference

MISFIT = "the models do not fit together:"


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
    hopeless = []
    if len({source.objective for source in sources} - {None}) > 1:
        kinds = ", ".join(f"{source.given}: {source.objective}" for source in sources if source.objective)
        hopeless.append(
            f"they predict different things ({kinds}): between such weights nothing is meaningful. Where only the "
            "schedule differs, say the same in the scheduler_config.json of both"
        )
    if any(source.family is not base.family for source in others):
        kinds = ", ".join(f"{source.given}: {source.class_name}" for source in sources)
        hopeless.append(f"they are of different kinds ({kinds})")
    if hopeless:
        raise ModelError("\n  ".join([MISFIT, *hopeless]))
    merged, matches, found = _merged_components(sources, components), [], []
    for component, own in base.tensors.items():
        if component not in merged:
            matches += [Match(component, key, (reference,), is_copy=True) for key, reference in own.items()]
            continue
        of_others = [source.tensors[component] for source in others]
        found += [text for source, other in zip(others, of_others, strict=True)
                  for text in differences(component, own, other, base.given, source.given)]  # fmt: skip
        matches += _matched(component, own, of_others, on_mismatch)
    if found and on_mismatch is None:
        way_out = "--on_mismatch base or tuned says whose tensors to take there"
        raise ModelError("\n  ".join([MISFIT, *found]) + f"\n{way_out}")
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


def differences(component, own, other, base_name, other_name):
    """Yield sentences on what one model's {key: TensorReference} has and the other's has not."""
    ours, theirs = ({key for key, one in some.items() if not is_copied(key, one)} for some in (own, other))
    both = [key for key in own if key in ours and key in other]
    pairs = ((key, list(own[key].shape), list(other[key].shape)) for key in both)
    for keys, what in (
        ([key for key in own if key in ours - other.keys()], f"{other_name} lacks"),
        ([key for key in other if key in theirs - own.keys()], f"unlike {other_name}, {base_name} lacks"),
        ([f"{key} {one} and {two}" for key, one, two in pairs if one != two], f"shapes differ in {other_name},"),
        ([key for key in both if not other[key].dtype.is_floating_point], f"{other_name} has only integers for"),
    ):
        if keys:
            yield f"{what} {len(keys)} tensor(s) of the {component}: {first_few(keys)}"


def _matched(component, own, of_others, on_mismatch):
    for key, reference in own.items():
        partners = [other.get(key) for other in of_others]
        if is_copied(key, reference) or all(partner == reference for partner in partners):  # of one file
            yield Match(component, key, (reference,), is_copy=True)
        elif all(one and one.shape == reference.shape and one.dtype.is_floating_point for one in partners):
            yield Match(component, key, (reference, *partners))
        else:
            taken = (on_mismatch == "tuned" and partners[0]) or reference
            yield Match(component, key, (taken,), is_copy=True)
    for key, reference in of_others[0].items() if on_mismatch == "tuned" else ():
        if key not in own and not is_copied(key, reference):
            yield Match(component, key, (reference,), is_copy=True)
