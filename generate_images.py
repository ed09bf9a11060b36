"""Draw prompts with one or more models, seeds, guidance scales and step counts, side by side.

    python generate_images.py --model base=models/mini-sd tuned=runs/chalk --size 64 \\
        --prompt "a small red circle on a white background" --guidance_scale 1 3 7.5 --output_dir runs/look

Reads   diffusers pipelines (folders or Hub names) and checkpoint-N folders of a run.
Writes  into --output_dir: one PNG per picture, named by what it shows; grid.png (rows: prompts and seeds, columns:
        models, guidance scales and steps); images.json with everything that made each picture.
The same seed gives the same starting noise to every model, whatever the batch size and the device.
"""

import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag, parse, write_json
from finetuning.draws import torch_generator
from finetuning.evaluation.grid import labelled_grid
from finetuning.families.contract import ModelProblem
from finetuning.families.pipelines import SCHEDULERS, ModelSource, open_pipeline


@dataclass
class Args:
    """Pictures to draw"""

    model: list[str] = flag(REQUIRED, "pipeline folders, Hub names or checkpoint-N folders; label=PATH names a column")
    prompt: list[str] | None = flag(None, "prompts")
    prompts_file: str | None = flag(None, "text file with a prompt on each line")
    output_dir: str = flag("generated", "where the pictures, grid.png and images.json go")
    seed: list[int] = flag([0], "seeds; each gives every prompt a picture")
    guidance_scale: list[float] = flag([7.5], "classifier-free guidance scales; 1 is none")
    num_inference_steps: list[int] = flag([25], "sampling steps")
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    negative_prompt: str | None = flag(None, "what to keep away from")
    weights: str = flag("ema", "which weights of a run or checkpoint", choices=("ema", "raw"))
    base: str | None = flag(None, "the rest of the model for checkpoint folders (none: what the run started from)")
    vae: str | None = flag(None, "another autoencoder, e.g. stabilityai/sd-vae-ft-mse")
    dtype: str | None = flag(None, "none: fp16 on a GPU, fp32 without", choices=("fp16", "bf16", "fp32"))
    batch_size: int = flag(4, "pictures drawn together")
    grid_scale: int = flag(160, "enlarge pictures in the grid to about this side, where they are smaller")

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
        labels = [ModelSource.parse(text).label for text in self.model]
        if len(set(labels)) < len(labels):
            yield f"--model: two columns would have the same name ({', '.join(labels)}): name them, label=PATH"

    def all_prompts(self):
        """From the flag and from the file."""
        lines = Path(self.prompts_file).read_text(encoding="utf-8").splitlines() if self.prompts_file else []
        return [*(self.prompt or []), *(line.strip() for line in lines if line.strip())]


def main(argv=None):
    """Draw, write, and return the exit status."""
    args = parse(Args, __doc__, argv)
    try:
        return draw(args)
    except ModelProblem as problem:
        print(f"ModelProblem: {problem}", file=sys.stderr)
        return 1


def draw(args):
    """Every model in turn, so that one at a time is in memory."""
    device = PartialState().device
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ModelSource.parse(text) for text in args.model]
    prompts = list(dict.fromkeys(args.all_prompts()))
    rows = list(product(prompts, args.seed))
    settings = list(product(args.guidance_scale, args.num_inference_steps))
    pictures, records = {}, []
    with tqdm(total=len(rows) * len(settings) * len(sources), unit="picture") as bar:
        for source in sources:
            pipeline = open_pipeline(
                source.path, weights=args.weights, base=args.base, vae=args.vae, scheduler=args.scheduler,
                device=device, dtype=precision,
            )  # fmt: skip
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
                for (prompt, seed), picture in zip(part, drawn, strict=True):
                    number = prompts.index(prompt)
                    made = {"prompt": prompt, "seed": seed, "model": source.label, "guidance_scale": guidance}
                    made |= {"num_inference_steps": steps, "path": source.path, "weights": args.weights}
                    made |= {"scheduler": args.scheduler, "vae": args.vae, "negative_prompt": args.negative_prompt}
                    made |= {"dtype": dtype, "size": list(picture.size), "file": f"{number:03d}_{_name(made)}"}
                    picture.save(folder / made["file"])
                    pictures[prompt, seed, source.label, guidance, steps] = picture
                    records.append(made)
                bar.update(len(part))
    write_json(folder / "images.json", records)

    columns = [(source.label, *setting) for source, setting in product(sources, settings)]
    cells = [[pictures[(*row, *column)] for column in columns] for row in rows]
    labels = [prompt if len(args.seed) == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    labelled_grid(cells, labels, [_heading(args, *c) for c in columns], args.grid_scale).save(folder / "grid.png")
    print(f"{len(records)} pictures and grid.png in {folder}")
    return 0


def _height_and_width(size):
    sides = [int(side) for side in size.split("x")] if size else []
    return {"height": sides[0], "width": sides[-1]} if sides else {}


def _heading(args, label, guidance, steps):
    guidance_text = f" guidance {guidance:g}" if len(args.guidance_scale) > 1 else ""
    return label + guidance_text + (f" {steps} steps" if len(args.num_inference_steps) > 1 else "")


def _name(made):
    """What the picture shows, as a file name: prompt, model, seed, guidance scale, steps.

    The prompt's number goes before it: prompts may be alike in their first words, or have no Latin letters.
    """
    words = lambda text: re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
    setting = f"seed{made['seed']}_g{made['guidance_scale']:g}_s{made['num_inference_steps']}"
    return f"{words(made['prompt'])[:80]}_{words(made['model'])}_{setting}.png"


if __name__ == "__main__":
    sys.exit(main())
