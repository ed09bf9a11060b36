"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet over latents of 4 channels, an autoencoder."""

import math
from types import MappingProxyType

from finetuning.families.family import Component, Family


class StableDiffusion(Family):
    """The UNet attends to the last hidden state of one CLIP text encoder."""

    pipeline = "StableDiffusionPipeline"
    components = (
        Component(
            "unet", "UNet2DConditionModel", lora_prefix="unet.", kohya_prefix="lora_unet_",
            original_prefixes=("model.diffusion_model.",),
        ),
        Component(
            "text_encoder", "CLIPTextModel", lora_prefix="text_encoder.text_model.",
            kohya_prefix="lora_te_text_model_", file_prefix="text_model.",
            original_prefixes=("cond_stage_model.transformer.", "cond_stage_model.model."),  # of SD 1.x, of SD 2.x
        ),
        Component("vae", "AutoencoderKL", original_prefixes=("first_stage_model.",)),
    )  # fmt: skip
    tokenizers = MappingProxyType({"text_encoder": "tokenizer"})
    pipeline_options = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )

    def encode_text(self, encoders, tokens):
        """{"prompt_embeds": [n, k, d]}."""
        return {"prompt_embeds": encoders["text_encoder"](tokens["text_encoder"], return_dict=False)[0]}

    def denoise(self, denoiser, noisy, timesteps, text, extras):
        return denoiser(noisy, timesteps, text["prompt_embeds"], return_dict=False)[0]

    def problems(self, components):
        unet, vae, encoder = (components[name].config for name in ("unet", "vae", "text_encoder"))
        if {unet.in_channels, unet.out_channels} != {vae.latent_channels}:
            yield (
                f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, and the autoencoder has "
                f"{vae.latent_channels}: an inpainting or upscaling model is not trained by this script"
            )
        if not (type(vae.scaling_factor) in (int, float) and 0 < vae.scaling_factor < math.inf):
            yield f"the autoencoder's config.json has a scaling_factor of {vae.scaling_factor}, which scales nothing"
        if unet.cross_attention_dim != encoder.hidden_size:
            yield (
                f"the UNet expects text of width {unet.cross_attention_dim} and the text encoder gives "
                f"{encoder.hidden_size}: set cross_attention_dim in --unet_config"
            )
