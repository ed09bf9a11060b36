"""The flags that choose a model, what a run asks of one, and the error that a family raises."""

from dataclasses import dataclass
from typing import Protocol

from finetuning.cli import REQUIRED, UserError, flag


@dataclass
class ModelArgs:
    """Model"""

    pretrained_model_name_or_path: str = flag(REQUIRED, "folder of a diffusers pipeline, or its name on the Hub")
    revision: str | None = flag(None, "git revision of the Hub model")
    variant: str | None = flag(None, "variant of the weights, e.g. fp16; components that have none are loaded without")
    train_text_encoder: bool = flag(False, "train the text encoder as well (see --text_encoder_lr)")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: slower, far less memory")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers, tested against PyTorch's at the start; without a GPU PyTorch's is used"
    )
    compile: bool = flag(False, "torch.compile the UNet: a slow first step, then faster ones")
    channels_last: bool = flag(False, "the UNet's weights and activations in channels_last memory format; GPU only")
    cache_dir: str | None = flag(None, "where models and datasets of the Hub are kept", affects_result=False)


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


class Trained(Protocol):
    """What a run asks of the thing it trains: every weight of a model, or adapters on a frozen one.

    Besides, its parts: tokenizer, scheduler, vae, and `denoiser`, one module that holds all that is trained.
    """

    pixels_per_latent: int

    def trained_parameters(self):
        """{name: parameter}, in a fixed order."""

    def parameter_groups(self, denoiser_lr, text_encoder_lr):
        """Optimizer groups, [{"params": [...], "lr": ...}]."""

    def posterior(self, pixels):
        """(mean, standard deviation) of the latents of images [batch, 3, H, W] in [-1, 1]."""

    def scale_latents(self, latents):
        """To unit variance."""

    def pipeline(self):
        """A context with a diffusers pipeline of the weights as they are now."""

    def save_trained(self, folder, suffix="", weights=None):
        """Write into a checkpoint what is trained: as it is now, or `weights` by parameter name."""

    def load_trained(self, folder, ema):
        """Take what a checkpoint holds; with `ema`, return its averaged weights by parameter name, else None."""

    def summary(self):
        """What is trained and what is frozen, in one line."""

    def copied_bytes(self):
        """Size of what the finished result holds besides the trained weights."""
