"""The kinds of captioners: how each model is loaded, asked and read; and the flags of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetuning.cli import SEEDS, flag
from finetuning.families.model_args import ModelError


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


def _blip(model, processor, images, prompt):
    """Without a prompt the model begins with its own first token, and repeats only that."""
    inputs = processor(images=images, text=[prompt] * len(images) if prompt else None, return_tensors="pt")
    return inputs, inputs.input_ids.shape[1] - 1 if prompt else 1  # it drops the prompt's end token


def _blip2(model, processor, images, prompt):
    """OPT and Vicuna repeat all that they were given, T5 its own first token."""
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    return inputs, 1 if model.language_model.config.is_encoder_decoder else inputs.input_ids.shape[1]


def _complete_blip2(model, processor):
    """Checkpoints of before 2024 do not say how many tokens an image takes, nor which token stands for it."""
    processor.num_query_tokens = model.config.num_query_tokens
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
    if model.config.image_token_id is None:
        model.config.image_token_id = token
    if model.get_input_embeddings().num_embeddings <= token:
        model.resize_token_embeddings(token + 1)


def _git(model, processor, images, prompt):
    """The prompt without its end token, which would end the caption as well."""
    inputs = processor(images=images, return_tensors="pt")
    words = processor.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    inputs["input_ids"] = torch.tensor([[processor.tokenizer.cls_token_id, *words]] * len(images))
    return inputs, 1 + len(words)


def _florence2(model, processor, images, prompt):
    """It has an encoder, so that its output begins with a first token of its own and repeats nothing else."""
    return processor(images=images, text=[prompt] * len(images), return_tensors="pt"), 1


def _chat(model, processor, images, prompt):
    """One question to each image. Raises ModelError where the model was not made for questions."""
    template = processor.chat_template
    if not template:
        raise ModelError(f"{model.name_or_path} has no chat template: take a model tuned to follow instructions")
    question = {"type": "text", "text": prompt}
    chats = [[{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images]
    straight = {"enable_thinking": False} if "enable_thinking" in str(template) else {}  # thoughts are no caption
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, **straight,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )  # fmt: skip
    return inputs, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


BLIP = Kind("BlipForConditionalGeneration", "Salesforce/blip-image-captioning-large", _blip)
CAPTIONERS = {
    "blip": BLIP,
    "blip2": Kind("Blip2ForConditionalGeneration", "Salesforce/blip2-opt-2.7b", _blip2, prepare=_complete_blip2),
    "instructblip": Kind(
        "InstructBlipForConditionalGeneration", "Salesforce/instructblip-flan-t5-xl", _blip2,
        default_prompt="Write a short description for the image.", prepare=_complete_blip2,
    ),
    "git": Kind("GitForCausalLM", "microsoft/git-large-coco", _git),
    "florence2": Kind(
        "Florence2ForConditionalGeneration", "florence-community/Florence-2-large", _florence2,
        default_prompt="<DETAILED_CAPTION>", prompts=("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"),
    ),
    # Any model that talks about images, by its chat template: Qwen-VL, SmolVLM, LLaVA (JoyCaption), InternVL ...
    "image-text-to-text": Kind(
        "AutoModelForImageTextToText", "Qwen/Qwen2.5-VL-3B-Instruct", _chat, num_beams=1,
        default_prompt="Describe this image in one sentence, beginning with its subject.",
    ),
    "clip-interrogator": BLIP,  # whose caption interrogator.py goes on with
}  # fmt: skip


@dataclass
class GenerationArgs:
    """How captions are made"""

    prompt: str | None = flag(None, "how the caption begins, or the question to the model (none: the captioner's own)")
    num_beams: int | None = flag(None, "width of the beam search (none: 3, image-text-to-text 1); 1 is greedy", min=1)
    top_p: float | None = flag(None, "nucleus sampling, e.g. 0.9, not beams: more various, less exact", above=0, max=1)
    temperature: float = flag(1.0, "above 1 captions are more various, below 1 less", above=0, requires="top_p")
    seed: int = flag(0, "an image's caption hangs on this and its name alone", requires="top_p", **SEEDS)
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
