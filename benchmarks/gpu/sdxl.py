"""Stable Diffusion XL's shape with random weights, in fp16 as its files on the Hub.

python benchmarks/gpu/sdxl.py FOLDER [--small]     writes FOLDER/model and FOLDER/images
"""

import argparse
from pathlib import Path

import torch
from sd15 import DEVICE, ROOT, SMALL_TEXT, SMALL_VAE, TEXT, TOKENS, VAE, WORDS, make_images

UNET = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SMALL_UNET = {
    "block_out_channels": (8, 8, 16), "attention_head_dim": (1, 1, 2), "transformer_layers_per_block": (1, 1, 1),
    "cross_attention_dim": 40, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT_2 |= {"hidden_act": "gelu", "projection_dim": 1280}
SMALL_TEXT_2 = {**SMALL_TEXT, "hidden_size": 24, "projection_dim": 24}


def make(folder, small):
    """A pipeline folder, built where it is quickest, and 64 smooth images with captions."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    mini = ROOT / "models/mini-sdxl"
    torch.manual_seed(0)
    text_config = lambda sizes: CLIPTextConfig(
        vocab_size=WORDS, max_position_embeddings=TOKENS, bos_token_id=629, eos_token_id=630, pad_token_id=630,
        dtype="float32", **sizes,
    )  # fmt: skip
    with torch.device(DEVICE):
        components = {
            "unet": UNet2DConditionModel(
                sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                addition_embed_type="text_time", **(SMALL_UNET if small else UNET),
            ),
            "vae": AutoencoderKL(
                sample_size=1024, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025,
                force_upcast=False,  # as that of the presets in fp16, sdxl-vae-fp16-fix
                **(SMALL_VAE if small else VAE),
            ),
            "text_encoder": CLIPTextModel(text_config(SMALL_TEXT if small else TEXT)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(SMALL_TEXT_2 if small else TEXT_2)),
        }  # fmt: skip
    for name in ("tokenizer", "tokenizer_2"):
        components[name] = CLIPTokenizer.from_pretrained(mini / name, model_max_length=TOKENS)
    components["scheduler"] = DDPMScheduler.from_pretrained(mini / "scheduler")
    StableDiffusionXLPipeline(**components, add_watermarker=False).to(torch.float16).save_pretrained(folder / "model")
    make_images(folder / "images", side=64 if small else 1024)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    make(args.folder, args.small)
