"""The table of README.md: the base and every checkpoint, read off the pixels of their images.

python experiments/seed_000/measure.py runs/seed_000 models/mini-sd
"""

import sys
from pathlib import Path

from finetuning.evaluation.grid import labelled_grid
from finetuning.evaluation.statistics import mean_of
from finetuning.families.pipelines import open_pipeline
from finetuning.shapes.scenes import SHAPES
from finetuning.training.checkpoint import checkpoints_in
from models.measure_mini_sd import chalk_and_right, generate, held_out_scenes

CAPTIONS, SHOWN = 64, 5
HERE = Path(__file__).parent


def main(folder, base):
    """Print the table, and write images of the same captions and seeds by every checkpoint."""
    scenes, columns = held_out_scenes(2 * SHOWN, SHAPES[:4])[0], {}
    print("| model | in chalk | right, shapes shown | right, shapes left out |\n|---|---|---|---|")
    for name, path in [("base", base), *((f"step {step}", path) for step, path in checkpoints_in(folder / "run"))]:
        pipeline = open_pipeline(path, scheduler="dpm++")
        shown, left_out = (chalk_and_right(pipeline, shapes, CAPTIONS) for shapes in (SHAPES[:4], SHAPES[4:]))
        cells = [mean_of(values) for values in (shown["chalk"], shown["right"], left_out["right"])]
        written = [f"{100 * one.value:.0f} % ({100 * one.low:.0f} to {100 * one.high:.0f})" for one in cells]
        print(f"| {name} | {' | '.join(written)} |", flush=True)
        columns[name] = generate(pipeline, scenes, guidance_scale=3.0, steps=25)
    rows = list(map(list, zip(*columns.values(), strict=True)))
    labelled_grid(rows, [scene.caption for scene in scenes], list(columns), 128).save(HERE / "checkpoints.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
