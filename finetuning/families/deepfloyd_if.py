"""DeepFloyd IF: pixels in place of latents, a T5 text encoder, a learned variance; and its upscaler.

The two are diffusers' home for what GLIDE is: a base at 64 pixels and an upscaler that is told the small image.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F

from finetuning.families.family import Component, Family, Pixels
from finetuning.families.model_args import ModelError
from finetuning.rng import gaussian, sent, uniform


class DeepFloydIF(Family):
    """The UNet attends to the last hidden state of a T5, which reads 77 tokens of a lower-case caption."""

    pipeline = "IFPipeline"
    components = (
        Component("unet", "UNet2DConditionModel", lora_prefix="unet."),
        Component("text_encoder", "T5EncoderModel"),
    )
    tokenizers = MappingProxyType({"text_encoder": "tokenizer"})
    pipeline_options = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    )
    call_options = MappingProxyType({"clean_caption": False})
    text_length = 77
    image_channels = 1  # of the UNet's input, in images

    def clean(self, caption):
        return caption.lower().strip()

    def encode_text(self, encoders, tokens):
        """{"prompt_embeds": [n, k, d]}."""
        encoder, ids = encoders["text_encoder"], tokens["text_encoder"]
        kept = (ids != encoder.config.pad_token_id).long()
        return {"prompt_embeds": encoder(ids, attention_mask=kept, return_dict=False)[0]}

    def codec(self, components):
        return Pixels()

    def denoise(self, denoiser, noisy, timesteps, text, extras):
        return denoiser(noisy, timesteps, text["prompt_embeds"], return_dict=False)[0]

    def check_scheduler(self, scheduler):
        """DDPM alone samples with the learned variance; for the others the pipeline cuts its channels off."""
        if type(scheduler).__name__ != "DDPMScheduler":
            scheduler.register_to_config(variance_type="fixed_small")

    def problems(self, components):
        unet, encoder = (components[name].config for name in ("unet", "text_encoder"))
        channels = Pixels.channels
        if unet.in_channels != self.image_channels * channels or unet.out_channels != 2 * channels:
            yield (
                f"the UNet of a {self.pipeline} takes {self.image_channels * channels} channels and gives "
                f"{2 * channels}, the prediction and its variance; this one takes {unet.in_channels} and gives "
                f"{unet.out_channels}"
            )
        width = unet.encoder_hid_dim or unet.cross_attention_dim
        if width != encoder.d_model:
            yield (
                f"the UNet expects text of width {width} and the text encoder gives {encoder.d_model}: set "
                "encoder_hid_dim in --unet_config"
            )


class DeepFloydIFSuperResolution(DeepFloydIF):
    """The UNet sees the small image, enlarged and noised, beside the noisy one, and is told how much noise that is
    (arXiv 2106.15282, section 4: conditioning augmentation)."""

    pipeline = "IFSuperResolutionPipeline"
    schedulers = ("scheduler", "image_noising_scheduler")
    image_channels = 2
    needs_image = True

    def condition(self, batch, latents, model, seed):
        """The low-resolution image is made of the whole one, and enlarged whole: of a patch it would be another."""
        args, noising = model.conditioning_args, model.schedules["image_noising_scheduler"]
        enlarged = F.interpolate(downscaled(latents, args.upscale_factor), latents.shape[2:], mode="bilinear",
                                 align_corners=True)  # fmt: skip
        if args.patch_size:
            latents, enlarged = _patches(latents, enlarged, seed, batch, args.patch_size)
        share = uniform(seed, "noise level", batch.step, batch.rows)
        level = sent((share * (args.max_noise_level + 1)).long(), latents.device)
        noise = sent(gaussian(seed, "low-resolution noise", batch.step, batch.rows, latents.shape[1:]), latents.device)
        return latents, {"low_resolution": noising.add_noise(enlarged, noise, level), "noise_level": level}

    def denoise(self, denoiser, noisy, timesteps, text, extras):
        images = torch.cat([noisy, extras["low_resolution"].to(noisy.dtype)], 1)
        return denoiser(
            images, timesteps, text["prompt_embeds"], class_labels=extras["noise_level"], return_dict=False
        )[0]

    def check_scheduler(self, scheduler):
        """Euler's samplers scale what goes into the UNet, and would scale the small image too."""
        super().check_scheduler(scheduler)
        if type(scheduler).__name__.startswith("Euler"):
            raise ModelError(
                f"an upscaler cannot be sampled with the {type(scheduler).__name__}: take another --scheduler"
            )

    def problems(self, components):
        yield from super().problems(components)
        if components["unet"].config.class_embed_type != "timestep":
            yield (
                "the UNet of an upscaler is told the noise level as its class, and this one has no class_embed_type "
                "timestep: diffusers would leave the level out without a word"
            )


def downscaled(images, factor):
    """Images [n, 3, H, W] in [-1, 1] by antialiased bicubic, in the 256 levels that an image file has."""
    size = [side // factor for side in images.shape[2:]]
    small = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return ((small + 1) * 127.5).round() / 127.5 - 1


def _patches(images, enlarged, seed, batch, patch):
    """The same random patch of each row of both, [n, 3, patch, patch], or as much as there is."""
    height, width = (min(patch, side) for side in images.shape[2:])
    spare = {"patch top": images.shape[2] - height, "patch left": images.shape[3] - width}
    places = [
        (uniform(seed, axis, batch.step, batch.rows) * (room + 1)).long().tolist() for axis, room in spare.items()
    ]
    cut = lambda all_rows: torch.stack([
        row[:, top : top + height, left : left + width] for row, top, left in zip(all_rows, *places, strict=True)
    ])  # fmt: skip
    return cut(images), cut(enlarged)
