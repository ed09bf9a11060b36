"""Florence-2: three lengths of caption, each asked for by a word of its own."""

from finetuning.captioning.kinds import Kind

TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


def encode(model, processor, images, prompt):
    """It has an encoder, so that its output begins with a first token of its own and repeats nothing else."""
    return processor(images=images, text=[prompt] * len(images), return_tensors="pt"), 1


KIND = Kind(
    "Florence2ForConditionalGeneration", "florence-community/Florence-2-large", encode,
    default_prompt="<DETAILED_CAPTION>", prompts=TASKS,
)  # fmt: skip
