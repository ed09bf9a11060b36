"""Looking at the model while it trains: the same prompts and seeds, the same rows, timesteps and noise, every time."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from finetuning.cli import flag
from finetuning.diffusion.objective import NoiseArgs
from finetuning.evaluation.denoising import chosen_rows, row_losses
from finetuning.evaluation.grid import labelled_grid
from finetuning.files import write_json
from finetuning.rng import torch_generator


@dataclass
class ValidationArgs:
    """Validation"""

    validation_prompts: list[str] | None = flag(
        None, "prompts of images that are generated with fixed seeds, by the base first (step 0)", affects_result=False
    )
    validation_prompt: str | None = flag(None, "one prompt more, as in diffusers' LoRA script", affects_result=False)
    num_validation_images: int = flag(1, "images per prompt; 0: none", min=0, affects_result=False)
    validation_epochs: int = flag(
        5, "validate every N epochs, unless --validation_steps is given; 0: only at the start and the end", min=0,
        affects_result=False,
    )  # fmt: skip
    validation_steps: int | None = flag(None, "validate every N optimizer steps", min=1, affects_result=False)
    validation_guidance_scale: float = flag(7.5, "guidance scale of the validation images", affects_result=False)
    validation_inference_steps: int = flag(
        25, "sampling steps of the validation images (DPM-Solver++)", min=1, affects_result=False
    )
    validation_fraction: float = flag(
        0.0, "hold out this share of the rows for the validation loss, where the dataset has no validation split",
        min=0, below=1,
    )  # fmt: skip
    validation_loss_rows: int = flag(
        256, "rows for the validation loss, at most; 0: no validation loss", min=0, affects_result=False
    )

    @property
    def prompts(self):
        """All prompts to generate images of."""
        if not self.num_validation_images:
            return []
        return [*(self.validation_prompts or []), *([self.validation_prompt] if self.validation_prompt else [])]


class Validation:
    """Images and loss of the averaged weights (of the raw ones without EMA), at step 0, every so often, at the end.

    Written below output_dir/validation: step-N/*.png and grid.png, losses.json of the base, and comparison.png.
    """

    def __init__(self, run, args: ValidationArgs, model, ema, schedule, held_out, noise_args: NoiseArgs, batch_size):
        self.run, self.args, self.model, self.ema, self.schedule = run, args, model, ema, schedule
        self.held_out = held_out if args.validation_loss_rows else None
        self.noise_args, self.batch_size = noise_args, batch_size
        self.folder = Path(run.output_dir) / "validation"
        self.done_at = None

    def due(self, step, steps_per_epoch):
        """Whether step 0, the step or the epoch asks for validation."""
        every = self.args.validation_steps or self.args.validation_epochs * steps_per_epoch
        return step == 0 or bool(every and step % every == 0)

    def look(self, step):
        """Draw and measure on the main process; the others wait."""
        if self.done_at != step and self.run.is_main and (self.args.prompts or self.held_out):
            with self.ema.averaged_weights(), torch.no_grad():
                if self.held_out:
                    self.run.log(self._loss(step), step)
                if self.args.prompts:
                    self._draw(step)
        self.done_at = step
        self.run.wait_for_everyone()

    def compare(self, step):
        """A grid of the base beside the model as it is at `step`; its path, or None without prompts."""
        base, tuned = self.folder / "step-0", self.folder / f"step-{step}"
        if not (self.run.is_main and self.args.prompts and base.is_dir() and tuned.is_dir()):
            return None
        names = self._names()
        rows = [[Image.open(folder / name).convert("RGB") for folder in (base, tuned)] for name in names]
        labels = [prompt for prompt in self.args.prompts for _ in range(self.args.num_validation_images)]
        path = Path(self.run.output_dir) / "comparison.png"
        labelled_grid(rows, labels, ["base", f"fine-tuned, step {step}"], scale_to=192).save(path)
        return path

    def _names(self):
        count = self.args.num_validation_images
        return [f"prompt{p:02d}-{i}.png" for p in range(len(self.args.prompts)) for i in range(count)]

    def _draw(self, step):
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        count, prompts = self.args.num_validation_images, self.args.prompts
        asked = [prompt for prompt in prompts for _ in range(count)]
        images = []
        with self.model.pipeline() as pipeline, self.run.accelerator.autocast():
            for start in range(0, len(asked), self.batch_size):
                part = asked[start : start + self.batch_size]
                seed = self.run.args.seed
                images += pipeline(
                    part,
                    num_inference_steps=self.args.validation_inference_steps,
                    guidance_scale=self.args.validation_guidance_scale,
                    generator=[torch_generator(seed, "validation picture", start + i) for i in range(len(part))],
                    **self._size(),
                ).images
        for name, image in zip(self._names(), images, strict=True):
            image.save(folder / name)
        rows = [images[start : start + count] for start in range(0, len(images), count)]
        grid = labelled_grid(rows, prompts, [f"step {step}"] + [""] * (count - 1), scale_to=192)
        grid.save(folder / "grid.png")
        self.run.log_images("validation", images, step)
        self.run.log_images("validation grid", [grid], step)

    def _size(self):
        height, width = self.run.args.size
        return {"height": height, "width": width}

    def _loss(self, step):
        """The mean over the held-out rows, and its change since step 0 with a 95 % interval, paired row by row."""
        losses = self._row_losses()
        values = {"validation_loss": losses.mean().item()}
        kept = self.folder / "base_losses.json"
        if step == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(kept, losses.tolist())
        elif kept.is_file():
            base = torch.tensor(json.loads(kept.read_text(encoding="utf-8")), dtype=torch.float64)
            if len(base) == len(losses) > 1:
                change = losses - base
                values["validation_loss_change"] = change.mean().item()
                values["validation_loss_change_95"] = 1.96 * change.std().item() / math.sqrt(len(change))
        return values

    def _row_losses(self):
        """[rows], float64."""
        seed = self.run.args.seed
        rows = chosen_rows(len(self.held_out), self.args.validation_loss_rows, seed)
        return row_losses(
            self.model, self.held_out, rows, self.schedule, self.noise_args, seed=seed, batch_size=self.batch_size,
            device=self.run.device, autocast=self.run.accelerator.autocast,
        )  # fmt: skip
