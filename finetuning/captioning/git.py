"""GIT: completes the prompt as a caption; small and fast."""

import torch

from finetuning.captioning.kinds import Kind


def encode(model, processor, images, prompt):
    """The prompt without its end token, which would end the caption as well."""
    inputs = processor(images=images, return_tensors="pt")
    words = processor.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    inputs["input_ids"] = torch.tensor([[processor.tokenizer.cls_token_id, *words]] * len(images))
    return inputs, 1 + len(words)


KIND = Kind("GitForCausalLM", "microsoft/git-large-coco", encode)
