"""Any model that talks about images, by its chat template: Qwen-VL, SmolVLM, LLaVA (JoyCaption), InternVL ..."""

from finetuning.captioning.kinds import Kind
from finetuning.families.model_args import ModelError


def encode(model, processor, images, prompt):
    """One question to each image. Raises ModelError where the model was not made for questions."""
    template = processor.chat_template
    if not template:
        raise ModelError(f"{model.name_or_path} has no chat template: take a model tuned to follow instructions")
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image in images
    ]
    straight = {"enable_thinking": False} if "enable_thinking" in str(template) else {}  # thoughts are no caption
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, **straight,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )  # fmt: skip
    return inputs, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


KIND = Kind(
    "AutoModelForImageTextToText", "Qwen/Qwen2.5-VL-3B-Instruct", encode, num_beams=1,
    default_prompt="Describe this image in one sentence, beginning with its subject.",
)  # fmt: skip
