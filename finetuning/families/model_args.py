"""The flags that choose a model, and the error that a family raises."""

from dataclasses import dataclass

from finetuning.cli import REQUIRED, UserError, flag


@dataclass
class ModelArgs:
    """Model"""

    pretrained_model_name_or_path: str = flag(
        REQUIRED, "folder of a diffusers pipeline, or its name on the Hub", reads=True
    )
    revision: str | None = flag(None, "git revision of the Hub model")
    variant: str | None = flag(None, "variant of the weights, e.g. fp16; components that have none are loaded without")
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another autoencoder: a pipeline, a folder of its own, or either on the Hub, e.g. "
        "madebyollin/sdxl-vae-fp16-fix", reads=True,
    )  # fmt: skip
    train_text_encoder: bool = flag(False, "train the text encoders as well (see --text_encoder_lr)")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: slower, far less memory")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers, where at the start it computes what PyTorch's does and is faster; otherwise, "
        "and without a GPU, PyTorch's",
    )  # fmt: skip
    compile: bool = flag(False, "torch.compile the UNet: a slow first step, then faster ones")
    channels_last: bool = flag(False, "the UNet's weights and activations in channels_last memory format; GPU only")
    cache_dir: str | None = flag(None, "where models and datasets of the Hub are kept", affects_result=False)


@dataclass
class UpscalingArgs:
    """Upscalers"""

    upscale_factor: int = flag(4, "of an upscaler: it sees the image this many times smaller", min=2)
    patch_size: int | None = flag(
        None, "of an upscaler: train on a random patch of this side of each image, in pixels (none: the whole)", min=8
    )
    max_noise_level: int = flag(
        350, "of an upscaler: the most noise that the small image gets, in timesteps; each row draws from 0 to this",
        min=0, max=999,
    )  # fmt: skip


@dataclass
class StartArgs:
    """Weights to start from"""

    non_ema_revision: str | None = flag(
        None, "git revision whose UNet is trained; the average starts from the main one"
    )
    non_ema_variant: str | None = flag(
        None, "variant whose UNet is trained, e.g. non_ema as in SD 1.5; the average starts from the main one"
    )
    from_scratch: bool = flag(
        False, "train a UNet of random weights instead of the base's", conflicts=("non_ema_revision", "non_ema_variant")
    )
    unet_config: str | None = flag(
        None, "JSON/YAML file or text of UNet settings to change, e.g. "
        "'{block_out_channels: [96, 192], layers_per_block: 3, attention_head_dim: 8}'", requires="from_scratch",
    )  # fmt: skip


class ModelError(UserError):
    """A model that cannot be used as asked; the message names the flag and the fix."""
