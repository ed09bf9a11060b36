"""Untrained pixel-space models in DeepFloyd IF's layout, which diffusers samples: what GLIDE is, in any size.

    python -m models.make_start --preset miniglide --output_dir build/miniglide
    python -m models.make_start --preset miniglide --unet '{layers_per_block: 1}' --text '{num_layers: 2}' \\
        --output_dir build/smaller

A preset is what the UNet and the text encoder are made with; --unet and --text change single settings of it.
"""

import string

import torch

from finetuning.files import write_json
from finetuning.shapes import scenes

TOKENS = 77  # that DeepFloyd IF's pipelines read of a caption
PRESETS = {
    # Seed 001's channels, heads, blocks, text width and layers
    "miniglide": {
        "unet": {
            "sample_size": 64, "block_out_channels": (96, 192, 288, 384), "layers_per_block": 3,
            "attention_head_dim": 32,
        },
        "text": {"d_model": 512, "num_layers": 16, "num_heads": 16, "d_kv": 32, "d_ff": 2048},
    },
    # The same for a CPU and the shapes world
    "mini-if": {
        "unet": {
            "sample_size": 32, "block_out_channels": (32, 64, 96), "layers_per_block": 1, "attention_head_dim": 16,
            "norm_num_groups": 16,
        },
        "text": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 256},
    },
    # An upscaler from 64 to 256 pixels: attends to text alone, so that it takes images of any size
    "mini-x4": {
        "unet": {
            "sample_size": 256, "block_out_channels": (32, 48, 64, 96), "layers_per_block": 1, "attention_head_dim": 16,
            "norm_num_groups": 16, "in_channels": 6, "class_embed_type": "timestep", "only_cross_attention": True,
        },
        "text": {"d_model": 64, "num_layers": 1, "num_heads": 4, "d_kv": 16, "d_ff": 128},
    },
}  # fmt: skip


def make(folder, preset, unet=None, text=None, prediction_type="epsilon", seed=0):
    """Write a pipeline of random weights. `unet` and `text` {setting: value} change the preset's.

    Returns {component: number of parameters}.
    """
    import diffusers
    from transformers import T5Config, T5EncoderModel

    chosen = {name: PRESETS[preset][name] | (changes or {}) for name, changes in (("unet", unet), ("text", text))}
    tokens = tokenizer()
    torch.manual_seed(seed)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokens), dtype="float32", **chosen["text"]))
    denoiser = diffusers.UNet2DConditionModel(**_unet(chosen["unet"], encoder.config.d_model))
    # GLIDE's schedule; its clip of x_0 is thresholding at the pixels' own range
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type=prediction_type,
        thresholding=True, sample_max_value=1.0, clip_sample=False,
    )  # fmt: skip
    parts = {"unet": denoiser, "text_encoder": encoder, "tokenizer": tokens, "scheduler": scheduler}
    kind = "IFPipeline"
    if denoiser.config.in_channels == 6:
        kind = "IFSuperResolutionPipeline"
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    nothing = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    getattr(diffusers, kind)(**parts, **nothing, requires_safety_checker=False).save_pretrained(folder)
    # Kept in config.json: else transformers 5 opens an fp16 file as fp16, beside an fp32 UNet
    write_json(folder / "text_encoder/config.json", encoder.config.to_dict() | {"dtype": "float32"})
    return {
        name: sum(p.numel() for p in module.parameters()) for name, module in (("unet", denoiser), ("text", encoder))
    }


def _unet(settings, text_width):
    """All settings of a UNet2DConditionModel whose first level does not attend."""
    attending = len(settings["block_out_channels"]) - 1
    return {
        "in_channels": 3, "out_channels": 6, "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * attending),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * attending, "ResnetUpsampleBlock2D"),
        "cross_attention_dim": text_width, "encoder_hid_dim": text_width, "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text", "addition_embed_type_num_heads": 4, **settings,
    }  # fmt: skip


def tokenizer():
    """T5's, whose pieces are the shapes world's words, and letters for all others."""
    from transformers import T5Tokenizer

    words = [*scenes.SHAPES, *scenes.COLORS, *scenes.BACKGROUNDS, *scenes.RADII, *scenes.RELATIONS]
    words = dict.fromkeys(" ".join(["a an on background chalk drawing of with", *words]).split())
    letters = ["▁", *string.ascii_lowercase, *string.digits, *".,'-"]
    pieces = [(f"▁{word}", -1.0) for word in words] + [(letter, -10.0) for letter in letters if letter not in words]
    special = [(one, 0.0) for one in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=TOKENS)
