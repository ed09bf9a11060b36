"""The flags that name the models of a merge, and the models they name."""

from dataclasses import dataclass

from finetuning.cli import REQUIRED, flag
from finetuning.families.model_args import ModelError
from finetuning.merging.matching import match
from finetuning.merging.sources import open_source


@dataclass
class BaseArgs:
    """Base"""

    base: str = flag(REQUIRED, "the model to start from: pipeline, Hub name, checkpoint-N, single file or bare UNet")
    revision: str | None = flag(None, "git revision of a base on the Hub")
    variant: str | None = flag(None, "weights' variant of the base, e.g. fp16")
    layout_from: str | None = flag(
        None, "pipeline whose configuration and tokenizer go with a single file or bare UNet"
    )
    cache_dir: str | None = flag(None, "where models of the Hub are kept")

    def open_base(self):
        """Its Source. Raises ModelError."""
        return open_source(
            self.base, revision=self.revision, variant=self.variant, cache_dir=self.cache_dir,
            layout_from=self.layout_from,
        )  # fmt: skip


@dataclass
class TunedArgs(BaseArgs):
    """Tuned models"""

    tuned: list[str] = flag(REQUIRED, "the model(s) that were trained further")
    weights: str = flag("ema", "which weights of a tuned run or checkpoint", choices=("ema", "raw"))
    tuned_revision: str | None = flag(None, "git revision of tuned models on the Hub")
    tuned_variant: str | None = flag(None, "weights' variant of the tuned models")
    parts: list[str] | None = flag(
        None, "parts that are merged, e.g. unet,text_encoder; the others are the base's (none: those two, where all "
        "models have them)"
    )  # fmt: skip
    on_mismatch: str | None = flag(
        None, "whose tensors to take where names or shapes differ or values are not finite (none: refuse)",
        choices=("base", "tuned"),
    )  # fmt: skip

    def problems(self):
        if self.parts is not None:
            self.parts = [part for word in self.parts for part in word.split(",") if part]
            if unknown := [part for part in self.parts if part not in ("unet", "text_encoder", "vae")]:
                yield f"--parts {' '.join(unknown)}: the parts are unet, text_encoder and vae"
            if not self.parts:
                yield "--parts names none: the parts are unet, text_encoder and vae"

    def open_models(self, origin=None):
        """[base, tuned ..., origin]: the Sources of all. Raises ModelError with all that cannot be opened."""
        return opened([self.open_base, *(lambda name=name: self._open_tuned(name) for name in self.tuned),
                       *([lambda: self._open_tuned(origin)] if origin else [])])  # fmt: skip

    def match(self, sources):
        """matching.match, as the flags ask for it."""
        return match(sources, self.parts, self.on_mismatch)

    @property
    def fallback(self):
        """Which of the sources is taken where a tensor is not finite; None refuses."""
        return {None: None, "base": 0, "tuned": 1}[self.on_mismatch]

    def _open_tuned(self, name):
        return open_source(
            name, weights=self.weights, revision=self.tuned_revision, variant=self.tuned_variant,
            cache_dir=self.cache_dir, layout_from=self.layout_from,
        )  # fmt: skip


def opened(openers):
    """What each of the functions returns; their ModelProblems come together as one."""
    found, problems = [], []
    for opener in openers:
        try:
            found.append(opener())
        except ModelError as problem:
            problems.append(str(problem))
    if problems:
        raise ModelError("\n".join(problems))
    return found
