"""BLIP-2 and InstructBLIP: a language model that sees the image as some tokens before the prompt."""

from finetuning.captioning.kinds import Kind


def encode(model, processor, images, prompt):
    """OPT and Vicuna repeat all that they were given, T5 its own first token."""
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    return inputs, 1 if model.language_model.config.is_encoder_decoder else inputs.input_ids.shape[1]


def prepare(model, processor):
    """Checkpoints of before 2024 do not say how many tokens an image takes, nor which token stands for it."""
    processor.num_query_tokens = model.config.num_query_tokens
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
    if model.config.image_token_id is None:
        model.config.image_token_id = token
    if model.get_input_embeddings().num_embeddings <= token:
        model.resize_token_embeddings(token + 1)


BLIP2 = Kind("Blip2ForConditionalGeneration", "Salesforce/blip2-opt-2.7b", encode, prepare=prepare)
INSTRUCTBLIP = Kind(
    "InstructBlipForConditionalGeneration", "Salesforce/instructblip-flan-t5-xl", encode,
    default_prompt="Write a short description for the image.", prepare=prepare,
)  # fmt: skip
