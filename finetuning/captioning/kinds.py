"""What a captioner of some kind is made of, and the flags of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from finetuning.cli import flag


@dataclass(frozen=True)
class Kind:
    """How one kind of model is loaded, asked, and read."""

    model_class: type
    default_model: str
    encode: Callable  # (model, processor, RGB images, prompt) -> (inputs, tokens of the output before the caption)
    default_prompt: str = ""
    prompts: tuple[str, ...] = ()  # all that there are, where a model knows only some
    num_beams: int = 3
    prepare: Callable = lambda model, processor: None  # what an old checkpoint lacks


@dataclass
class GenerationArgs:
    """How captions are made"""

    prompt: str | None = flag(None, "how the caption begins, or the question to the model (none: the captioner's own)")
    num_beams: int | None = flag(None, "width of the beam search (none: 3, or 1 for image-text-to-text); 1 is greedy")
    top_p: float | None = flag(None, "nucleus sampling in place of beams, e.g. 0.9: more various, less exact")
    temperature: float = flag(1.0, "with --top_p: above 1 more various, below 1 less")
    seed: int = flag(0, "with --top_p: another seed, another caption; an image's depends on this and its name alone")
    min_length: int = flag(5, "fewest tokens of a caption, without the prompt")
    max_length: int = flag(60, "most tokens of a caption, without the prompt; Stable Diffusion reads 75")
    max_side: int = flag(1024, "images with a longer side are shown to the model smaller, with this one")
    batch_size: int = flag(8, "images captioned together")
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=("fp16", "bf16", "fp32"))

    def problems(self):
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top_p {self.top_p} must be above 0 and at most 1"
        if self.top_p is not None and self.num_beams not in (None, 1):
            yield "--top_p samples and --num_beams searches: give one of them"
        if self.temperature <= 0:
            yield f"--temperature {self.temperature} must be above 0"
        elif self.temperature != 1 and self.top_p is None:
            yield "--temperature does nothing without --top_p"
        if self.seed != 0 and self.top_p is None:
            yield "--seed does nothing without --top_p"
        if self.num_beams is not None and self.num_beams < 1:
            yield f"--num_beams {self.num_beams} must be at least 1"
        if not 0 <= self.min_length <= self.max_length or self.max_length < 1:
            yield f"--min_length {self.min_length} must be 0 or more, and --max_length {self.max_length} no less, but 1"
        for name in ("max_side", "batch_size"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} must be at least 1"
