"""What a captioner of some kind is made of, and the flags of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from finetuning.cli import SEEDS, flag


@dataclass(frozen=True)
class Kind:
    """How one kind of model is loaded, asked, and read."""

    model_class: str  # its name in transformers
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
    num_beams: int | None = flag(
        None, "width of the beam search (none: 3, or 1 for image-text-to-text); 1 is greedy", min=1
    )
    top_p: float | None = flag(
        None, "nucleus sampling in place of beams, e.g. 0.9: more various, less exact", above=0, max=1
    )
    temperature: float = flag(1.0, "above 1 captions are more various, below 1 less", above=0, requires="top_p")
    seed: int = flag(
        0, "another seed, another caption; an image's depends on this and its name alone", requires="top_p", **SEEDS
    )
    min_length: int = flag(5, "fewest tokens of a caption, without the prompt", min=0)
    max_length: int = flag(60, "most tokens of a caption, without the prompt; Stable Diffusion reads 75", min=1)
    max_side: int = flag(1024, "images with a longer side are shown to the model smaller, with this one", min=1)
    batch_size: int = flag(8, "images captioned together", min=1, affects_result=False)
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=("fp16", "bf16", "fp32"))

    def problems(self):
        if self.top_p is not None and self.num_beams not in (None, 1):
            yield "--top_p samples and --num_beams searches: give one of them"
        if self.min_length > self.max_length:
            yield f"--min_length {self.min_length} is above --max_length {self.max_length}"
