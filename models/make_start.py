"""Untrained models to start from: the Stable Diffusion of models/mini-sd, and pixel-space models in GLIDE's sizes.

    python -m models.make_start --vae build/mini-sd/vae --output_dir build/mini-sd/start
    python -m models.make_start --preset miniglide --output_dir build/miniglide

Writes a diffusers pipeline folder whose denoiser and text encoder still know nothing (the autoencoder is the trained
one of --vae); train_text_to_image.py --train_text_encoder trains both. The pixel-space presets stand in
pixel_start.py; --unet and --text change single settings of them, as YAML.
"""

import argparse
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetuning.diffusion.objective import PREDICTION_TYPES
from finetuning.files import write_json
from finetuning.shapes import scenes
from models import pixel_start

TOKENS = 32
TEXT_WIDTH = 128
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def vocabulary():
    """CLIP's layout: 256 bytes, the same at the end of a word, merges that build the world's words, two specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = alphabet + [letter + "</w>" for letter in alphabet]
    words = " ".join([*scenes.SHAPES, *scenes.COLORS, *scenes.BACKGROUNDS, *scenes.RADII, *scenes.RELATIONS])
    merges = []
    for word in dict.fromkeys(f"{words} a an on background chalk drawing of with".split()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, pieces = tuple(pieces[:2]), [pieces[0] + pieces[1], *pieces[2:]]
            if pair not in merges:
                merges.append(pair)
                entries.append("".join(pair))
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    return {entry: number for number, entry in enumerate(entries)}, merges


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("mini-sd", *pixel_start.PRESETS), default="mini-sd")
    parser.add_argument("--vae", type=Path, help="the trained autoencoder, for mini-sd")
    parser.add_argument("--unet", type=yaml.safe_load, help="settings of the UNet that a pixel-space preset changes")
    parser.add_argument("--text", type=yaml.safe_load, help="settings of the text encoder, likewise")
    parser.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="of a pixel-space preset"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if args.preset != "mini-sd":
        counts = pixel_start.make(args.output_dir, args.preset, args.unet, args.text, args.prediction_type)
        for name, count in counts.items():
            print(f"{name}: {count:,} parameters")
        return
    if args.vae is None:
        parser.error("--preset mini-sd needs --vae")

    entries, merges = vocabulary()
    tokenizer = args.output_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    # Both the slow tokenizer's files, which transformers 4 and other tools read, and transformers 5's tokenizer.json.
    CLIPTokenizer(vocab=entries, merges=merges, model_max_length=TOKENS).save_pretrained(tokenizer)
    write_json(tokenizer / "vocab.json", entries)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tokenizer / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(entries), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=entries["<|startoftext|>"],
        eos_token_id=entries["<|endoftext|>"], pad_token_id=entries["<|endoftext|>"],
        dtype="float32",  # kept in config.json: else transformers 5 opens the fp16 file as fp16, beside an fp32 UNet
    )  # fmt: skip
    text_encoder = CLIPTextModel(config)
    text_encoder.config.save_pretrained(args.output_dir / "text_encoder")
    weights = {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    save_file(weights, args.output_dir / "text_encoder/model.safetensors", metadata={"format": "pt"})

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(args.output_dir / "unet")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(args.output_dir / "scheduler")
    shutil.copytree(args.vae, args.output_dir / "vae", ignore=shutil.ignore_patterns("*.png"), dirs_exist_ok=True)
    write_json(args.output_dir / "model_index.json", MODEL_INDEX)


if __name__ == "__main__":
    main()
