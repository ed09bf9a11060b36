"""Generate images of prompts with one or more models, LoRAs and their scales, seeds, guidance scales and step counts.

    python generate_images.py --model base=models/mini-sd tuned=runs/chalk --size 64 \\
        --prompt "a small red circle on a white background" --guidance_scale 1 3 7.5 --output_dir runs/compare

    python generate_images.py --model models/mini-sd --lora runs/chalk-lora/checkpoint-100 runs/chalk-lora \\
        --lora_scale 0 0.5 0.8 1 --size 64 --prompt "a large purple star on a white background"

Reads   diffusers pipelines (folders or Hub names), checkpoint-N folders of a run, and LoRAs: runs and checkpoints of
        train_lora.py, or a .safetensors file as diffusers, kohya or PEFT write it.
Writes  into --output_dir: one PNG per image, named by what it shows; grid.png (rows: prompts and seeds, columns:
        models, LoRAs and their scales, guidance scales and steps); images.json with all that made each image.
The same seed gives the same starting noise to every model, whatever the batch size and the device.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, SEEDS, flag, paths_read, run_script
from finetuning.data.findings import counted
from finetuning.evaluation.grid import labelled_grid
from finetuning.families import generation
from finetuning.families.generation import DTYPES, UpscalerArgs, parse_size
from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora, set_scale, weights_hash
from finetuning.families.pipelines import SCHEDULERS, ModelSource, check_models, open_pipeline
from finetuning.families.table import family_of
from finetuning.files import file_names, output_problems, read_text, write_image, write_json
from finetuning.rng import torch_generator


@dataclass
class Args(UpscalerArgs):
    """Images to generate"""

    model: list[str] = flag(REQUIRED, "pipeline folders, Hub names or checkpoint-N folders; label=PATH names a column")
    prompt: list[str] | None = flag(None, "prompts")
    prompts_file: str | None = flag(None, "text file with a prompt on each line")
    lora: list[str] | None = flag(None, "LoRA folders or files, one at a time on each model; label=PATH names a column")
    lora_scale: list[float] = flag(
        [1.0], "how strongly a LoRA acts; 0 is the model without it, to the last bit", requires="lora"
    )
    output_dir: str = flag("generated", "where the images, grid.png and images.json go")
    seed: list[int] = flag([0], "seeds; each gives every prompt an image", **SEEDS)
    guidance_scale: list[float] = flag([7.5], "classifier-free guidance scales; 1 is none")
    num_inference_steps: list[int] = flag([25], "sampling steps", min=1)
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    negative_prompt: str | None = flag(None, "what to keep away from")
    weights: str = flag("ema", "which weights of a run or checkpoint", choices=("ema", "raw"))
    base: str | None = flag(None, "the rest of the model for checkpoint folders (none: their run's base)", reads=True)
    vae: str | None = flag(None, "another autoencoder, e.g. stabilityai/sd-vae-ft-mse", reads=True)
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=tuple(DTYPES))
    batch_size: int = flag(4, "images generated together", min=1)
    upscaler: str | None = flag(None, "upscaler that every image goes through (docs/pixel_space.md)", reads=True)
    grid_scale: int = flag(160, "enlarge images in the grid to about this side, where they are smaller")

    def problems(self):
        if not (self.prompt or self.prompts_file):
            yield 'say what to generate: --prompt "..." or --prompts_file FILE'
        if self.prompts_file and not Path(self.prompts_file).is_file():
            yield f"--prompts_file {self.prompts_file}: there is no such file"
        elif self.prompts_file and not self.all_prompts():
            yield f"--prompts_file {self.prompts_file} has no prompts in it"
        yield from generation.size_problems(self.size)
        inputs = [*paths_read(self), *(ModelSource.parse(text).path for text in [*self.model, *(self.lora or [])])]
        yield from output_problems(self.output_dir, inputs)
        for name, paths in (("model", self.model), ("lora", self.lora or [])):
            labels = [ModelSource.parse(text).label for text in paths]
            if len(set(labels)) < len(labels):
                yield f"--{name}: two columns would have the same name ({', '.join(labels)}): name them, label=PATH"
        for name in ("lora_scale", "guidance_scale", "num_inference_steps", "seed"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                yield f"--{name} {' '.join(map(str, values))} names one twice"

    def all_prompts(self):
        """From the flag and from the file, each once."""
        lines = read_text(self.prompts_file).splitlines() if self.prompts_file else []
        return list(dict.fromkeys([*(self.prompt or []), *(line.strip() for line in lines if line.strip())]))


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
        parts += [f"{self.lora.label} x {_short(self.scale)}"] if self.lora else []
        parts += [f"guidance {_short(self.guidance)}"] if len(args.guidance_scale) > 1 else []
        return " ".join(parts + ([f"{self.steps} steps"] if len(args.num_inference_steps) > 1 else []))


def main(argv=None):
    """Parse, generate, write, and return the exit status."""
    return run_script(Args, __doc__, generate_all, argv)


def generate_all(args):
    """Every model in turn, so that one at a time is in memory."""
    from accelerate import PartialState

    device, folder, prompts = PartialState().device, Path(args.output_dir), args.all_prompts()
    dtype_name, dtype = generation.inference_dtype(args.dtype, device)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ModelSource.parse(text) for text in args.model]
    loras = [ModelSource.parse(text) for text in args.lora or []]
    rows = list(product(prompts, args.seed))
    applied = list(product(loras, args.lora_scale)) or [(None, None)]
    settings = list(product(args.guidance_scale, args.num_inference_steps))
    columns = [Column(source, *lora, *setting) for source, lora, setting in product(sources, applied, settings)]
    names = file_names(prompts), file_names([one.label for one in [*sources, *loras]], 60)

    # Generate
    images, records = {}, []
    opening = {"weights": args.weights, "base": args.base}
    check_models([one.path for one in sources], [one.path for one in loras], [args.upscaler], vae=args.vae, **opening)
    opening |= {"scheduler": args.scheduler, "device": device, "dtype": dtype}
    upscaler = open_pipeline(args.upscaler, **opening) if args.upscaler else None
    with tqdm(total=len(rows) * len(columns), unit="image") as bar:
        for source in sources:
            pipeline = open_pipeline(source.path, vae=args.vae, **opening)
            for (lora, scale), (guidance, steps) in product_of_loras(pipeline, source, loras, args, settings):
                column = Column(source, lora, scale, guidance, steps)
                made = generation.generate(
                    pipeline, [prompt for prompt, _ in rows], [torch_generator(seed, "picture") for _, seed in rows],
                    batch_size=args.batch_size, size=parse_size(args.size), negative_prompt=args.negative_prompt,
                    guidance_scale=guidance, num_inference_steps=steps,
                )  # fmt: skip
                if upscaler:
                    seeds = [torch_generator(seed, "upscaled") for _, seed in rows]
                    made = generation.upscale(upscaler, list(made), [p for p, _ in rows], seeds, args, args.batch_size)
                for (prompt, seed), image in zip(rows, made, strict=True):
                    file = f"{prompts.index(prompt):03d}_{file_name(prompt, seed, column, *names)}"
                    write_image(folder / file, image)
                    images[prompt, seed, column] = image
                    record = {"prompt": prompt, "seed": seed, **column.facts(), "weights": args.weights}
                    record |= {"scheduler": args.scheduler, "vae": args.vae, "negative_prompt": args.negative_prompt}
                    record |= generation.upscaling_facts(args, args.upscaler)
                    records.append(record | {"dtype": dtype_name, "size": list(image.size), "file": file})
                    bar.update()
            del pipeline  # before the next one opens

    # Write
    write_json(folder / "images.json", records)
    cells = [[images[*row, column] for column in columns] for row in rows]
    labels = [prompt if len(args.seed) == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    grid = labelled_grid(cells, labels, [c.heading(args) for c in columns], args.grid_scale)
    write_image(folder / "grid.png", grid)
    print(f"{counted(len(records), 'image')} and grid.png in {folder}")


def product_of_loras(pipeline, source, loras, args, settings):
    """((LoRA, scale), setting) after another, the LoRA set in the pipeline; (None, None) where there are none."""
    if not loras:
        yield from product([(None, None)], settings)
        return
    base_hash = weights_hash(getattr(pipeline, family_of(pipeline).denoiser))
    for lora in loras:
        found = read_lora(lora.path, adaptable_components(pipeline), args.weights)
        if (note := found.note_on_base(source.path, base_hash)) and args.dtype != "bf16":  # which rounds the base
            tqdm.write(note, file=sys.stderr)
        attach(pipeline, found)
        for scale in args.lora_scale:
            set_scale(pipeline, scale)
            yield from product([(lora, scale)], settings)
        detach(pipeline)


def file_name(prompt, seed, column, prompt_names, labels):
    """What the image shows: prompt, model, LoRA and its scale, seed, guidance scale, steps."""
    lora = f"_{labels[column.lora.label]}-x{_short(column.scale)}" if column.lora else ""
    setting = f"seed{seed}_g{_short(column.guidance)}_s{column.steps}"
    return f"{prompt_names[prompt]}_{labels[column.source.label]}{lora}_{setting}.png"


def _short(number):
    """A number as a person writes it, in all its digits."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


if __name__ == "__main__":
    sys.exit(main())
