"""BLIP: completes the prompt as a caption, "a photograph of" ..."""

from finetuning.captioning.kinds import Kind


def encode(model, processor, images, prompt):
    """Without a prompt the model begins with its own first token, and repeats only that."""
    text = [prompt] * len(images) if prompt else None
    inputs = processor(images=images, text=text, return_tensors="pt")
    return inputs, inputs.input_ids.shape[1] - 1 if prompt else 1  # it drops the prompt's end token


KIND = Kind("BlipForConditionalGeneration", "Salesforce/blip-image-captioning-large", encode)
