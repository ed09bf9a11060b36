"""Draw with the checkpoints of every run, read the images' pixels, write the table and the plot of README.md.

python experiments/forgetting/measure.py runs/forgetting
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora
from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.shapes.scenes import SHAPES
from models.measure_mini_sd import chalk_and_right

EARLY = (10, 20, 30, 40, 60, 80)  # checkpoints of the runs that end at step 100
STEPS = (*EARLY, 100, 200, 300, 400, 500, 700, 1000)
SHOWN, LEFT_OUT = SHAPES[:4], SHAPES[4:]  # datasets/chalk has no cross and no star
LABELS = {"full": "full fine-tune", "lora": "LoRA, rank 16 on every layer"}
HERE = Path(__file__).parent


def measured(pipeline):
    """Per cent of 128 captions each: drawn in chalk, and right, of shapes shown; right, of shapes left out."""
    rows = {"shown": chalk_and_right(pipeline, SHOWN), "left_out": chalk_and_right(pipeline, LEFT_OUT)}
    return {f"{kind}, {what}": 100 * float(np.mean(rows[kind][what])) for kind in rows for what in ("chalk", "right")}


def measure_all(folder):
    """{label: {step: [one result a seed]}}; what was measured before is read again."""
    base = open_pipeline("models/mini-sd", scheduler="dpm++")
    kept = folder / "base.json"
    if not kept.is_file():
        write_json(kept, measured(base))
    results = {label: {0: [json.loads(kept.read_text(encoding="utf-8"))]} for label in LABELS}
    for label in LABELS:
        for run in sorted(folder.glob(f"{label}-[0-9]")):
            kept = run / "measured.json"
            known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
            for step in STEPS:
                if str(step) not in known:
                    place = run.with_name(f"{run.name}-early") if step in EARLY else run
                    checkpoint = place / f"checkpoint-{step}"
                    if label == "lora":
                        attach(base, read_lora(checkpoint, adaptable_components(base)))
                        known[str(step)] = measured(base)
                        detach(base)
                    else:
                        known[str(step)] = measured(open_pipeline(checkpoint, scheduler="dpm++"))
                    write_json(kept, known)
                results[label].setdefault(step, []).append(known[str(step)])
    return results


def table(results):
    """Markdown: a line for each step, mean and range over the seeds."""
    figures = ("shown, chalk", "shown, right", "left_out, right")
    heads = [f"{label}: {figure.replace('_', ' ')}" for label in results for figure in figures]
    lines = ["| step | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for step in (0, *STEPS):
        cells = []
        for by_step in results.values():
            for figure in figures:
                values = [one[figure] for one in by_step[step]]
                spread = f" ({min(values):.0f} to {max(values):.0f})" if max(values) - min(values) >= 0.5 else ""
                cells.append(f"{np.mean(values):.0f} %{spread}")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Both figures over the steps: mean of the seeds as a line, their range as a band."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for (label, by_step), panel in zip(results.items(), axes, strict=True):
        steps = sorted(by_step)
        for what, words in (
            ("shown, chalk", "learned: drawn in chalk, shapes shown"),
            ("left_out, right", "kept: right in shape and colour, shapes left out"),
        ):
            values = [[one[what] for one in by_step[step]] for step in steps]
            (line,) = panel.plot(steps, [np.mean(one) for one in values], marker="o", markersize=4, label=words)
            panel.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
            )
        panel.set_xscale("symlog", linthresh=10)
        panel.set_xticks([0, 10, 30, 100, 300, 1000], ["0", "10", "30", "100", "300", "1000"])
        panel.set(title=LABELS[label], xlabel="step", ylim=(-2, 102))
        panel.grid(alpha=0.3)
    axes[0].set(ylabel="per cent of 128 captions")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    everything = measure_all(Path(sys.argv[1]))
    plot(everything, HERE / "learned_and_kept.png")
    print(table(everything))
