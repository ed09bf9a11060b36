"""Stable Diffusion XL: two text encoders, and a UNet that is told the image's size and crop."""

from types import MappingProxyType

import torch

from finetuning.families.family import Component, Family
from finetuning.rng import sent


class StableDiffusionXL(Family):
    """The UNet attends to the last but one hidden states of both text encoders, joined, and is told the pooled text of
    the second (arXiv 2307.01952, section 2)."""

    pipeline = "StableDiffusionXLPipeline"
    components = (
        Component(
            "unet", "UNet2DConditionModel", lora_prefix="unet.", kohya_prefix="lora_unet_", kohya_original=True,
            original_prefixes=("model.diffusion_model.",),
        ),
        Component(
            "text_encoder", "CLIPTextModel", lora_prefix="text_encoder.text_model.",
            kohya_prefix="lora_te1_text_model_", file_prefix="text_model.",
            original_prefixes=("conditioner.embedders.0.transformer.",),
        ),
        Component(
            "text_encoder_2", "CLIPTextModelWithProjection", lora_prefix="text_encoder_2.",
            kohya_prefix="lora_te2_", original_prefixes=("conditioner.embedders.1.model.",),
        ),
        Component("vae", "AutoencoderKL", original_prefixes=("first_stage_model.",)),
    )  # fmt: skip
    tokenizers = MappingProxyType({"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"})
    pipeline_options = MappingProxyType({"add_watermarker": False})
    upcast = ("vae",)
    skips_weights = True  # of the first text encoder: what comes after its last layer but one
    kohya_kind = ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    marks = ("add_embedding.linear_1.", "model.diffusion_model.label_emb.", "conditioner.embedders.")

    def refusal(self, names):
        refiners = ("conditioner.embedders.0.model.", "requires_aesthetics_score")
        if any(name.startswith(refiners) for name in names):
            return "it is the refiner of Stable Diffusion XL, which has one text encoder: name the base model"
        return None

    def encode_text(self, encoders, tokens):
        """{"prompt_embeds": [n, k, d1 + d2], "pooled": [n, d2]}."""
        found = {name: encoders[name](tokens[name], output_hidden_states=True) for name in self.tokenizers}
        joined = torch.cat([one.hidden_states[-2] for one in found.values()], -1)
        return {"prompt_embeds": joined, "pooled": found["text_encoder_2"].text_embeds}

    def extras(self, batch, settings):
        """{"time_ids": [n, 6], "kept": [n]}: sizes and crop in pixels, and 0 for a dropped caption, whose text is zeros
        unless force_zeros_for_empty_prompt is off."""
        zeros = settings.get("force_zeros_for_empty_prompt", True)
        kept = [0.0 if zeros and caption == "" else 1.0 for caption in batch.captions]
        return {"time_ids": batch.sizes, "kept": sent(torch.tensor(kept), batch.sizes.device)}

    def denoise(self, denoiser, noisy, timesteps, text, extras):
        embeds, kept = text["prompt_embeds"], extras["kept"].to(text["prompt_embeds"].dtype)
        conditions = {"text_embeds": text["pooled"] * kept[:, None], "time_ids": extras["time_ids"].to(embeds.dtype)}
        return denoiser(
            noisy, timesteps, embeds * kept[:, None, None], added_cond_kwargs=conditions, return_dict=False
        )[0]
