"""The table and the plot of README.md: prompt accuracy by caption dropout and guidance scale.

python experiments/guidance_dropout/measure.py runs/guidance_dropout
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.shapes.scenes import SHAPES
from models.measure_mini_sd import generate, held_out_scenes, score

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
ROWS = 96  # captions of shapes that datasets/chalk shows, none of them trained on
HERE = Path(__file__).parent


def measure(folder):
    """{dropout: {guidance scale: [per cent right in shape and colour, one a seed]}}; known values are read again."""
    scenes, results = held_out_scenes(2 * ROWS, SHAPES[:4])[0], {}
    for run in sorted(path.parent for path in folder.glob("*/model_index.json")):
        kept = run / "measured.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if len(known) < len(GUIDANCE):
            pipeline = open_pipeline(run, scheduler="dpm++")
            for scale in GUIDANCE:
                found = score(scenes, generate(pipeline, scenes, guidance_scale=scale, steps=15))
                known[str(scale)] = {"right": 100 * found["shape and color"], "chalk": 100 * (1 - found["filled"])}
            print(run.name, known, flush=True)
            write_json(kept, known)
        for scale in GUIDANCE:
            results.setdefault(run.name.split("-")[0], {}).setdefault(scale, []).append(known[str(scale)])
    return results


def table(results, what):
    lines = ["| dropout | " + " | ".join(f"guidance {scale:g}" for scale in GUIDANCE) + " |", "|---" * 6 + "|"]
    for dropout, by_scale in results.items():
        values = [[one[what] for one in by_scale[scale]] for scale in GUIDANCE]
        cells = [f"{sum(own) / len(own):.0f} % ({min(own):.0f} to {max(own):.0f})" for own in values]
        lines.append(f"| {dropout} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for dropout, by_scale in results.items():
        values = [[one["right"] for one in by_scale[scale]] for scale in GUIDANCE]
        (line,) = axes.plot(GUIDANCE, [sum(own) / len(own) for own in values], marker="o", label=f"dropout {dropout}")
        axes.fill_between(GUIDANCE, [*map(min, values)], [*map(max, values)], alpha=0.15, color=line.get_color())
    axes.set(xlabel="guidance scale", ylabel="right in shape and colour (%)", ylim=(0, 102))
    axes.set(title="prompt accuracy after 300 steps on chalk; mean and range of three seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    everything = measure(Path(sys.argv[1]))
    plot(everything, HERE / "accuracy.png")
    print(f"right in shape and colour\n\n{table(everything, 'right')}\n\nin chalk\n\n{table(everything, 'chalk')}")
