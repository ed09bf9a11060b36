"""The flags that name the models of a merge, and the models they name."""

from dataclasses import dataclass
from pathlib import Path

from finetuning.cli import REQUIRED, UserError, flag
from finetuning.families.folders import STATE
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.families.table import FAMILIES
from finetuning.merging.methods import MethodArgs, ratio_problems
from finetuning.merging.ratios import block_rules
from finetuning.merging.tensor_matching import match

COMPONENTS = tuple(dict.fromkeys(one.name for family in FAMILIES.values() for one in family.components))


@dataclass
class BaseArgs:
    """Base"""

    base: str = flag(
        REQUIRED, "the model to start from: pipeline, Hub name, checkpoint-N, single file or bare UNet", reads=True
    )
    revision: str | None = flag(None, "git revision of a base on the Hub")
    variant: str | None = flag(None, "weights' variant of the base, e.g. fp16")
    layout_from: str | None = flag(
        None, "pipeline whose configuration and tokenizer go with a single file or bare UNet", reads=True
    )
    cache_dir: str | None = flag(None, "where models of the Hub are kept", affects_result=False)

    def open_base(self):
        """Its Source. Raises ModelError."""
        return self._open(self.base, revision=self.revision, variant=self.variant)

    def open_tuned(self, name):
        """The Source of a model that was trained further, as the flags for such models say. Raises ModelError."""
        return self._open(name, weights=self.weights, revision=self.tuned_revision, variant=self.tuned_variant)

    def _open(self, name, **options):
        options |= {"cache_dir": self.cache_dir, "relatives": True}
        lent = {"base": self.layout_from} if self.layout_from else {}
        if (Path(name) / STATE).is_file():  # a checkpoint has the base of its run, where that can be opened
            source = open_source(name, **options)
            source = open_source(name, **options, **lent) if source.folder is None and lent else source
        else:
            source = open_source(name, **options, **lent)
        for one, files in source.components.items():
            if files.config and (files.config / "config.json").is_file():
                source.check(one)
        return source


@dataclass
class TunedArgs(BaseArgs):
    """Tuned models"""

    tuned: list[str] = flag(REQUIRED, "the model(s) that were trained further", reads=True)
    weights: str = flag("ema", "which weights of a tuned run or checkpoint", choices=("ema", "raw"))
    tuned_revision: str | None = flag(None, "git revision of tuned models on the Hub")
    tuned_variant: str | None = flag(None, "weights' variant of the tuned models")
    components: list[str] | None = flag(
        None, "components that are merged, others are the base's (none: unet and text_encoder, where all have them)",
        was=("parts",),
    )  # fmt: skip
    on_mismatch: str | None = flag(
        None, "whose tensors to take where names or shapes differ or values are not finite (none: refuse)",
        choices=("base", "tuned"),
    )  # fmt: skip

    def problems(self):
        if self.components is not None:
            yield from component_problems(self.components, COMPONENTS)

    def open_models(self, origin=None):
        """[base, tuned ..., origin]: the Sources of all. Raises ModelError with all that cannot be opened."""
        names = [*self.tuned, *([origin] if origin else [])]
        return open_all([self.open_base, *(lambda name=name: self.open_tuned(name) for name in names)])

    def match(self, sources):
        """tensor_matching.match, as the flags ask for it."""
        components = None if self.components is None else separated(self.components)
        return match(sources, components, self.on_mismatch)

    @property
    def fallback(self):
        """Which of the sources is taken where a tensor is not finite; None refuses."""
        return {None: None, "base": 0, "tuned": 1}[self.on_mismatch]


@dataclass
class MixArgs(MethodArgs, TunedArgs):
    """Blocks"""

    block_ratios: list[str] | None = flag(
        None, "ratios of blocks: 25 numbers (IN00..IN11 M00 OUT00..OUT11; SDXL: 19), or 'unet.mid_block.*=0.2'"
    )

    @property
    def ratio_flag(self):
        """(name, numbers) of the flag with the ratios."""
        return "--ratio", self.ratio

    def problems(self):
        yield from ratio_problems(*self.ratio_flag, self.method, self.curve)
        try:
            given = [ratio for _, ratios in block_rules(self.block_ratios) for ratio in ratios]
            yield from ratio_problems("--block_ratios", given, self.method, self.curve)
        except ValueError as problem:
            yield f"--block_ratios {problem}"


def separated(words):
    """The words of a list that may also be separated by commas."""
    return [word for text in words for word in text.split(",") if word]


def component_problems(words, known):
    """What is wrong with the values of --components."""
    found = separated(words)
    if unknown := [word for word in found if word not in known]:
        yield f"--components {' '.join(unknown)}: there are {', '.join(known)}"
    if not found:
        yield f"--components names none: there are {', '.join(known)}"


def open_all(openers):
    """What each of the functions returns; their UserErrors come together as one ModelError."""
    found, problems = [], []
    for opener in openers:
        try:
            found.append(opener())
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise ModelError("\n".join(problems))
    return found
