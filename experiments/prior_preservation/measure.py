"""Draw with every run, read the images' pixels, write the table of README.md.

python experiments/prior_preservation/measure.py runs/prior_preservation
"""

import json
import sys
from pathlib import Path

import numpy as np

from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.shapes.scenes import SHAPES
from models.measure_mini_sd import chalk_and_right

LABELS = {
    "none": "nothing",
    "ten": "10 crosses",
    "crosses": "148 crosses",
    "both": "74 crosses and 66 stars",
    "quarter": "the same, `--prior_loss_weight 0.25`",
}


def measured(model):
    """Per cent of held-out captions, in chalk and right: 128 of shapes shown, 64 of crosses, 64 of stars."""
    pipeline = open_pipeline(model, scheduler="dpm++")
    shown = chalk_and_right(pipeline, SHAPES[:4])
    found = {"chalk": shown["chalk"], "right, shown": shown["right"]}
    for shape in SHAPES[4:]:  # datasets/chalk has none of them
        of_shape = chalk_and_right(pipeline, (shape,), 64)
        found |= {f"right, {shape}": of_shape["right"], f"chalk, {shape}": of_shape["chalk"]}
    return {what: 100 * float(np.mean(values)) for what, values in found.items()}


def measure_all(folder):
    """{label: [one result a seed]}; what was measured before is read again."""
    runs = {"base": ["models/mini-sd"]} | {label: sorted(folder.glob(f"{label}-[0-9]")) for label in LABELS}
    results = {}
    for label, models in runs.items():
        for model in models:
            kept = folder / f"{Path(model).name}.json"
            if not kept.is_file():
                write_json(kept, measured(model))
            results.setdefault(label, []).append(json.loads(kept.read_text(encoding="utf-8")))
    return results


def table(results):
    """Markdown: a line for each training, mean and range over the seeds."""
    figures = [name for name in results["base"][0] if not name.startswith("chalk,")]  # these stand in the text
    lines = ["| trained on besides | " + " | ".join(figures) + " |", "|---" * (1 + len(figures)) + "|"]
    for label, runs in results.items():
        cells = []
        for figure in figures:
            values = [one[figure] for one in runs]
            spread = f" ({min(values):.0f} to {max(values):.0f})" if max(values) - min(values) >= 0.5 else ""
            cells.append(f"{np.mean(values):.0f} %{spread}")
        lines.append(f"| {LABELS.get(label, 'the base')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(measure_all(Path(sys.argv[1]))))
