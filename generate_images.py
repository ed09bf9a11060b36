"""Draw prompts with one or more models, LoRAs and their scales, seeds, guidance scales and step counts, side by side.

    python generate_images.py --model base=models/mini-sd tuned=runs/chalk --size 64 \\
        --prompt "a small red circle on a white background" --guidance_scale 1 3 7.5 --output_dir runs/look

    python generate_images.py --model models/mini-sd --lora runs/chalk-lora/checkpoint-100 runs/chalk-lora \\
        --lora_scale 0 0.5 0.8 1 --size 64 --prompt "a large purple star on a white background"

Reads   diffusers pipelines (folders or Hub names), checkpoint-N folders of a run, and LoRAs: runs and checkpoints of
        train_lora.py, or a .safetensors file as diffusers, kohya or PEFT write it.
Writes  into --output_dir: one PNG per image, named by what it shows; grid.png (rows: prompts and seeds, columns:
        models, LoRAs and their scales, guidance scales and steps); images.json with all that made each image.
The same seed gives the same starting noise to every model, whatever the batch size and the device.
"""

import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag, parse
from finetuning.evaluation.grid import labelled_grid
from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora, set_scale, weights_hash
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import SCHEDULERS, ModelSource, open_pipeline
from finetuning.files import write_json
from finetuning.rng import torch_generator


@dataclass
class Args:
    """Images to draw"""

    model: list[str] = flag(REQUIRED, "pipeline folders, Hub names or checkpoint-N folders; label=PATH names a column")
    prompt: list[str] | None = flag(None, "prompts")
    prompts_file: str | None = flag(None, "text file with a prompt on each line")
    lora: list[str] | None = flag(None, "LoRA folders or files, one at a time on each model; label=PATH names a column")
    lora_scale: list[float] = flag([1.0], "how strongly a LoRA acts; 0 is the model without it, to the last bit")
    output_dir: str = flag("generated", "where the images, grid.png and images.json go")
    seed: list[int] = flag([0], "seeds; each gives every prompt an image")
    guidance_scale: list[float] = flag([7.5], "classifier-free guidance scales; 1 is none")
    num_inference_steps: list[int] = flag([25], "sampling steps")
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    negative_prompt: str | None = flag(None, "what to keep away from")
    weights: str = flag("ema", "which weights of a run or checkpoint", choices=("ema", "raw"))
    base: str | None = flag(None, "the rest of the model for checkpoint folders (none: what the run started from)")
    vae: str | None = flag(None, "another autoencoder, e.g. stabilityai/sd-vae-ft-mse")
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=("fp16", "bf16", "fp32"))
    batch_size: int = flag(4, "images drawn together")
    grid_scale: int = flag(160, "enlarge images in the grid to about this side, where they are smaller")

    def problems(self):
        if not (self.prompt or self.prompts_file):
            yield 'say what to draw: --prompt "..." or --prompts_file FILE'
        if self.prompts_file and not Path(self.prompts_file).is_file():
            yield f"--prompts_file {self.prompts_file}: there is no such file"
        elif self.prompts_file and not self.all_prompts():
            yield f"--prompts_file {self.prompts_file} has no prompts in it"
        if self.size and not re.fullmatch(r"\d+(x\d+)?", self.size):
            yield f"--size {self.size} must be one side in pixels or HEIGHTxWIDTH"
        elif self.size and any(int(side) % 8 or not int(side) for side in self.size.split("x")):
            yield f"--size {self.size} must be a multiple of 8"
        if self.batch_size < 1 or min(self.num_inference_steps) < 1:
            yield "--batch_size and --num_inference_steps must be at least 1"
        for name, paths in (("model", self.model), ("lora", self.lora or [])):
            labels = [ModelSource.parse(text).label for text in paths]
            if len(set(labels)) < len(labels):
                yield f"--{name}: two columns would have the same name ({', '.join(labels)}): name them, label=PATH"
        if len(set(self.lora_scale)) < len(self.lora_scale):
            yield f"--lora_scale {' '.join(map(str, self.lora_scale))} names a scale twice"
        if self.lora_scale != [1.0] and not self.lora:
            yield "--lora_scale does nothing without --lora"

    def all_prompts(self):
        """From the flag and from the file."""
        lines = Path(self.prompts_file).read_text(encoding="utf-8").splitlines() if self.prompts_file else []
        return [*(self.prompt or []), *(line.strip() for line in lines if line.strip())]


def main(argv=None):
    """Draw, write, and return the exit status."""
    args = parse(Args, __doc__, argv)
    try:
        return draw(args)
    except ModelError as problem:
        print(f"ModelError: {problem}", file=sys.stderr)
        return 1


def draw(args):
    """Every model in turn, so that one at a time is in memory."""
    from accelerate import PartialState

    device = PartialState().device
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ModelSource.parse(text) for text in args.model]
    loras = [ModelSource.parse(text) for text in args.lora or []]
    prompts = list(dict.fromkeys(args.all_prompts()))
    rows = list(product(prompts, args.seed))
    tried = list(product(loras, args.lora_scale)) or [(None, None)]
    settings = list(product(args.guidance_scale, args.num_inference_steps))
    columns = [Column(source, *lora, *setting) for source, lora, setting in product(sources, tried, settings)]
    images, records = {}, []
    with tqdm(total=len(rows) * len(columns), unit="image") as bar:
        for source in sources:
            pipeline = open_pipeline(
                source.path, weights=args.weights, base=args.base, vae=args.vae, scheduler=args.scheduler,
                device=device, dtype=precision,
            )  # fmt: skip
            for lora, scale in _with_each_lora(pipeline, source, loras, args):
                for (guidance, steps), start in product(settings, range(0, len(rows), args.batch_size)):
                    part = rows[start : start + args.batch_size]
                    drawn = pipeline(
                        [prompt for prompt, _ in part],
                        negative_prompt=[args.negative_prompt] * len(part) if args.negative_prompt else None,
                        guidance_scale=guidance,
                        num_inference_steps=steps,
                        generator=[torch_generator(seed, "picture") for _, seed in part],
                        **_height_and_width(args.size),
                    ).images
                    for (prompt, seed), image in zip(part, drawn, strict=True):
                        column = Column(source, lora, scale, guidance, steps)
                        made = {"prompt": prompt, "seed": seed, **column.facts(), "weights": args.weights}
                        made |= {"scheduler": args.scheduler, "vae": args.vae, "negative_prompt": args.negative_prompt}
                        made |= {"dtype": dtype, "size": list(image.size)}
                        made["file"] = f"{prompts.index(prompt):03d}_{_name(made)}"
                        image.save(folder / made["file"])
                        images[prompt, seed, column] = image
                        records.append(made)
                    bar.update(len(part))
            del pipeline  # before the next one opens
    write_json(folder / "images.json", records)

    cells = [[images[*row, column] for column in columns] for row in rows]
    labels = [prompt if len(args.seed) == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    labelled_grid(cells, labels, [c.heading(args) for c in columns], args.grid_scale).save(folder / "grid.png")
    print(f"{len(records)} images and grid.png in {folder}")
    return 0


@dataclass(frozen=True)
class Column:
    """What the images of one column of the grid have in common."""

    source: ModelSource
    lora: ModelSource | None
    scale: float | None
    guidance: float
    steps: int

    def facts(self):
        """For images.json."""
        lora = {"lora": self.lora.label, "lora_path": self.lora.path, "lora_scale": self.scale} if self.lora else {}
        facts = {"model": self.source.label, "path": self.source.path, **lora}
        return facts | {"guidance_scale": self.guidance, "num_inference_steps": self.steps}

    def heading(self, args):
        """What tells it from the others."""
        parts = [self.source.label] if len(args.model) > 1 or not self.lora else []
        parts += [f"{self.lora.label} x {self.scale:g}"] if self.lora else []
        parts += [f"guidance {self.guidance:g}"] if len(args.guidance_scale) > 1 else []
        return " ".join(parts + ([f"{self.steps} steps"] if len(args.num_inference_steps) > 1 else []))


def _with_each_lora(pipeline, source, loras, args):
    """(LoRA, scale) after (LoRA, scale), each set in the pipeline; (None, None) where there are none."""
    if not loras:
        yield None, None
        return
    base_hash = weights_hash(pipeline.unet)
    for lora in loras:
        found = read_lora(lora.path, adaptable_components(pipeline), args.weights)
        if (note := found.note_on_base(source.path, base_hash)) and args.dtype != "bf16":  # which rounds the base
            tqdm.write(note, file=sys.stderr)
        attach(pipeline, found)
        for scale in args.lora_scale:
            set_scale(pipeline, scale)
            yield lora, scale
        detach(pipeline)


def _height_and_width(size):
    sides = [int(side) for side in size.split("x")] if size else []
    return {"height": sides[0], "width": sides[-1]} if sides else {}


def _name(made):
    """What the image shows, as a file name: prompt, model, LoRA and its scale, seed, guidance scale, steps.

    The prompt's number goes before it: prompts may be alike in their first words, or have no Latin letters.
    """
    words = lambda text: re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
    setting = f"seed{made['seed']}_g{made['guidance_scale']:g}_s{made['num_inference_steps']}"
    lora = f"_{words(made['lora'])}-x{made['lora_scale']:g}" if "lora" in made else ""
    return f"{words(made['prompt'])[:80]}_{words(made['model'])}{lora}_{setting}.png"


if __name__ == "__main__":
    sys.exit(main())
