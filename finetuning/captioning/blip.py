"""BLIP: completes the prompt as a caption, "a photograph of" ..."""

from transformers import BlipForConditionalGeneration

from finetuning.captioning.contract import Kind


def encode(model, processor, pictures, prompt):
    """Without a prompt the model begins with its own first token, and repeats only that."""
    text = [prompt] * len(pictures) if prompt else None
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    return inputs, inputs.input_ids.shape[1] - 1 if prompt else 1  # it drops the prompt's end token


KIND = Kind(BlipForConditionalGeneration, "Salesforce/blip-image-captioning-large", encode)
