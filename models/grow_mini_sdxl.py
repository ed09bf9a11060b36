"""The Stable Diffusion XL that models/mini-sdxl is trained from: models/mini-sd, grown to SDXL's shape.

    python -m models.grow_mini_sdxl --output_dir build/mini-sdxl/start --images build/mini-sdxl/images

Writes a diffusers pipeline folder that answers much as mini-sd does, and images of several sizes to go on with. New
weights begin at zero where they join the old ones. SDXL reads the text encoder's last but one hidden states, without
its final norm: so the encoder gets one more layer, which nobody reads, and the UNet's projections of text take over the
norm (all but its division, which becomes a constant).
"""

import argparse
import json
import random
import shutil
from itertools import product
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import BACKGROUNDS, SIDE, draw_scene

TIME_WIDTH = 32  # of each of the six sizes
# Of the second text encoder. Another one than the first's: diffusers tells them in a single file by their widths.
SECOND_WIDTH = 96
SPREAD_OF_TEXT = 512  # captions that the norm's division is averaged over


@torch.no_grad()
def grown_encoder(base):
    """The same text encoder with one more layer: its last but one hidden states are the old one's last, not normed."""
    config = type(base.config).from_dict(
        base.config.to_dict() | {"num_hidden_layers": base.config.num_hidden_layers + 1}
    )
    grown = CLIPTextModel(config)
    grown.load_state_dict(base.state_dict(), strict=False)
    grown.encoder.layers[-1].load_state_dict(base.encoder.layers[-1].state_dict())
    return grown


@torch.no_grad()
def grown_unet(base, norm, spread, second):
    """The same UNet with linear projections, room for a second text, and SDXL's embedding of pooled text and sizes.

    norm    LayerNorm that the text no longer goes through
    spread  the average by which it divided
    second  config of the second text encoder
    """
    config = dict(base.config) | {
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": TIME_WIDTH,
        "cross_attention_dim": base.config.cross_attention_dim + second.hidden_size,
        "projection_class_embeddings_input_dim": second.projection_dim + 6 * TIME_WIDTH,
    }  # fmt: skip
    grown = UNet2DConditionModel.from_config(config)
    weights, wanted = base.state_dict(), grown.state_dict()
    for name in [name for name in weights if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]:
        if name.endswith("to_v.weight"):  # a shift of the keys changes no attention
            out = name.replace("to_v.weight", "to_out.0")
            weights[f"{out}.bias"] += weights[f"{out}.weight"] @ (weights[name] @ norm.bias)
        scaled = weights[name] * norm.weight
        centred = (scaled - scaled.mean(1, keepdim=True)) / spread
        weights[name] = torch.cat([centred, torch.zeros(len(centred), second.hidden_size)], 1)
    for name, value in wanted.items():
        if name.startswith("add_embedding."):
            weights[name] = torch.zeros_like(value) if "linear_2" in name else value
        elif name.endswith(("proj_in.weight", "proj_out.weight")):
            weights[name] = weights[name][:, :, 0, 0]
    grown.load_state_dict(weights)
    return grown


def grow(base, folder):
    """Write the pipeline."""
    rng = random.Random(0)
    captions = [draw_scene(rng).caption for _ in range(SPREAD_OF_TEXT)]
    tokens = base.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    first = grown_encoder(base.text_encoder)
    with torch.no_grad():
        spread = first(tokens, output_hidden_states=True).hidden_states[-2].std(-1, correction=0).mean()
    torch.manual_seed(0)
    config = type(base.text_encoder.config).from_dict(
        base.text_encoder.config.to_dict()
        | {"hidden_size": SECOND_WIDTH, "intermediate_size": 4 * SECOND_WIDTH, "projection_dim": SECOND_WIDTH}
        | {"hidden_act": "gelu"}
    )
    second = CLIPTextModelWithProjection(config)
    tokenizer = base.tokenizer
    StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        # padded with "!", as SDXL's second is
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizer.name_or_path, pad_token="!"),
        unet=grown_unet(base.unet, base.text_encoder.final_layer_norm, spread, config), scheduler=base.scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    for name, target in product(("vocab.json", "merges.txt"), ("tokenizer", "tokenizer_2")):
        shutil.copyfile(Path(tokenizer.name_or_path) / name, folder / target / name)  # which transformers 4 reads


def sized(scene, seed, rng):
    """An image of a scene: half of them as mini-sd knows them, a quarter small, a quarter with more background to the
    right or below, of which a random crop shows more or less.

    So the sizes and the crop that SDXL is told say how sharp an image is, and how much of the scene is cut away.
    """
    image, kind = draw(scene, seed), rng.choice(("plain", "plain", "small", "long"))
    if kind == "small":
        return image.resize((rng.randint(SIDE // 4, SIDE // 2),) * 2, Image.Resampling.BOX)
    if kind == "long":
        size = (rng.randint(SIDE + 8, SIDE + SIDE // 2), SIDE)
        longer = Image.new("RGB", size if rng.random() < 0.5 else size[::-1], BACKGROUNDS[scene.background])
        longer.paste(image)
        return longer
    return image


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(1), []
    for index in range(count):
        scene = draw_scene(rng, pair_share=0.6)
        sized(scene, rng.randrange(2**31), rng).save(folder / f"{index:05d}.png")
        lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/mini-sd"))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images to train on")
    parser.add_argument("--count", type=int, default=20000, help="how many (default %(default)s)")
    args = parser.parse_args()
    grow(StableDiffusionPipeline.from_pretrained(args.base, use_safetensors=True, safety_checker=None), args.output_dir)
    write_images(args.images, args.count)


if __name__ == "__main__":
    main()
