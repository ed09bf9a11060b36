"""Train the autoencoder of models/mini-sd from nothing, on images that are drawn as they are needed.

    python -m models.train_vae --output_dir build/mini-sd/vae --steps 8000

Reads nothing. Writes a diffusers AutoencoderKL (64 px images <-> 8 x 8 x 4 latents) whose `scaling_factor` gives
the latents unit variance, preview.png (top: drawn, below: what came back), and its log to standard output.
Both styles of the world are drawn, as a real Stable Diffusion's autoencoder knows more than its base was trained on.
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image

from finetuning.shapes.drawing import STYLES, draw
from finetuning.shapes.scenes import BACKGROUNDS, draw_scene

FOREGROUND_WEIGHT = 5.0  # most of an image is plain background: unweighted, small shapes lose their colours


def image_batch(first, count):
    """Images [count, 3, 64, 64] in [-1, 1] and the weight of each pixel [count, 1, 64, 64]."""
    images, backgrounds = [], []
    for index in range(first, first + count):
        rng = random.Random(index)
        scene = draw_scene(rng, pair_share=0.6)
        images.append(np.asarray(draw(scene, index, STYLES[index % 2])))
        backgrounds.append(BACKGROUNDS[scene.background])
    scale = lambda array: torch.from_numpy(np.stack(array)).float() / 127.5 - 1
    pixels = scale(images).permute(0, 3, 1, 2).contiguous()
    plain = scale(np.array(backgrounds))[:, :, None, None]
    foreground = ((pixels - plain).abs().amax(1, keepdim=True) > 0.1).float()
    near_foreground = F.max_pool2d(foreground, 5, stride=1, padding=2)
    return pixels, 1 + (FOREGROUND_WEIGHT - 1) * near_foreground


def build():
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def learning_rate(step, steps, peak):
    """Linear warm-up over 200 steps, then half a cosine to zero."""
    return peak * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def preview(vae, folder: Path):
    """Write preview.png; returns the standard deviation of the unscaled latents over 256 images."""
    vae.eval()
    pixels = image_batch(-256, 256)[0].to(vae.device)
    latents = vae.encode(pixels).latent_dist.sample(generator=torch.Generator().manual_seed(0))
    rows = torch.cat([pixels[:24], vae.decode(latents[:24]).sample.clamp(-1, 1)])
    rows = ((rows + 1) * 127.5).round().byte().reshape(2, 24, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(128, 1536, 3)
    Image.fromarray(rows.cpu().numpy()).save(folder / "preview.png")
    vae.train()
    return latents.std().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak of the schedule (default %(default)s)")
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="per latent element (default %(default)s)")
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = PartialState().device
    vae = build().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    started = time.monotonic()
    for step in range(args.steps):
        pixels, weight = (t.to(device) for t in image_batch(step * args.batch, args.batch))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            recovered = vae.decode(posterior.sample()).sample
        error = (recovered.float() - pixels).abs()
        reconstruction = (weight * (error + 2 * error**2)).mean() / weight.mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        (reconstruction + args.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            figures = f"reconstruction {reconstruction.item():.4f}  kl {divergence.item():.3f}"
            print(f"step {step:5d}  {figures}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 1000 == 999:
            preview(vae, args.output_dir)
    vae.register_to_config(scaling_factor=1 / preview(vae, args.output_dir))
    vae.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
