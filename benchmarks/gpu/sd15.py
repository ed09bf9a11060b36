"""Stable Diffusion 1.5's shape with random weights, the card's own speed, and the least a training step can cost.

    python benchmarks/gpu/sd15.py make FOLDER [--small]     writes FOLDER/model and FOLDER/images
    python benchmarks/gpu/sd15.py card                      prints the card, its memory and its matmul rate as JSON
    python benchmarks/gpu/sd15.py train FOLDER --batch 8 [--channels_last] [--compile] [--steps 30]

`train` is the floor beside which the scripts are seen: the UNet under fp16 autocast, its loss, a loss scaler, a clipped
gradient and fused AdamW, on latents and text that already lie on the GPU. Run it under child.py, which times the steps.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL_UNET = {"block_out_channels": (8, 8, 8, 16), "cross_attention_dim": 16, "attention_head_dim": 2}
SMALL_UNET |= {"norm_num_groups": 4, "layers_per_block": 1}
SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS, WORDS = 77, 49_408  # a caption's length and the entries of CLIP's vocabulary, most of which stay unused here
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(folder, small):
    """A pipeline folder in fp32, built where it is quickest, and 64 smooth images with captions."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    model, mini = folder / "model", ROOT / "models/mini-sd"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(sample_size=64, **(SMALL_UNET if small else UNET))
        vae = AutoencoderKL(
            sample_size=512, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, **(SMALL_VAE if small else VAE),
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=WORDS, max_position_embeddings=TOKENS, bos_token_id=629, eos_token_id=630,
                pad_token_id=630, dtype="float32", **(SMALL_TEXT if small else TEXT),
            )
        )  # fmt: skip
    unet.save_pretrained(model / "unet")
    vae.save_pretrained(model / "vae")
    text.config.save_pretrained(model / "text_encoder")
    weights = {f"text_model.{name}": value.contiguous() for name, value in text.state_dict().items()}
    save_file(weights, model / "text_encoder/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(mini / "tokenizer", model / "tokenizer")
    CLIPTokenizer.from_pretrained(mini / "tokenizer", model_max_length=TOKENS).save_pretrained(model / "tokenizer")
    shutil.copytree(mini / "scheduler", model / "scheduler")
    shutil.copyfile(mini / "model_index.json", model / "model_index.json")
    make_images(folder / "images", side=64 if small else 512)


def make_images(folder, side, number=64):
    """Waves of colour as JPEG, since noise would decode more slowly than photos do, and metadata.jsonl."""
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    lines = []
    for count in range(number):
        waves = [np.sin(a * x + b * y + c) for a, b, c in draw.uniform(0, 12, (3, 3))]
        pixels = (np.stack(waves, axis=-1) * 127 + 128).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{count:03}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{count:03}.jpg", "text": f"a red circle on a background of {count}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def card():
    """What the card is, and the median rate of a product of 8192 x 8192 matrices of random numbers: of bf16, where the
    card has none of fp16."""
    if DEVICE == "cpu":
        return {"card": "CPU"}
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=dtype)
    seconds = []
    for _ in range(40):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    facts = torch.cuda.get_device_properties(0)
    rate = 2 * 8192**3 / statistics.median(seconds[10:]) / 1e12
    return {"card": facts.name, "gb": round(facts.total_memory / 1e9, 1), "matmul_tflops": round(rate, 1)}


def train(folder, batch, steps, channels_last, compiled):
    """The bare loop."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "model/unet", dtype=torch.float32).to(DEVICE).train()
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compiled:
        unet.compile()
    on_gpu = DEVICE == "cuda"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=on_gpu)
    scaler = torch.amp.GradScaler(DEVICE, enabled=on_gpu)
    side = 64 if unet.config.cross_attention_dim == UNET["cross_attention_dim"] else 8
    noisy, noise = torch.randn(2, batch, 4, side, side, device=DEVICE)
    text = torch.randn(batch, TOKENS, unet.config.cross_attention_dim, device=DEVICE, dtype=torch.float16)
    timesteps = torch.randint(0, 1000, (batch,), device=DEVICE)
    for _ in range(steps):
        with torch.autocast(DEVICE, torch.float16, enabled=on_gpu):
            predicted = unet(noisy, timesteps, text if on_gpu else text.float(), return_dict=False)[0]
        scaler.scale((predicted.float() - noise).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "card", "train"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.small)
    elif args.what == "card":
        print(json.dumps(card()))
    else:
        train(args.folder, args.batch, args.steps, args.channels_last, args.compile)


if __name__ == "__main__":
    main()
