"""The table and the plot of README.md: what run.sh trained, at every scale, read off the pixels.

python experiments/lora_rank/measure.py runs/lora_rank
"""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora, set_scale
from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.shapes.scenes import SHAPES
from models.measure_mini_sd import generate, held_out_scenes, score

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
SHOWN, LEFT_OUT = SHAPES[:4], SHAPES[4:]  # datasets/chalk has no cross and no star
HERE = Path(__file__).parent


def measured(pipeline):
    """Per cent drawn in chalk, and right in shape and colour, of 128 held-out captions of each kind of shape."""
    found = {}
    for name, shapes in (("shown", SHOWN), ("left_out", LEFT_OUT)):
        scenes = held_out_scenes(256, shapes)[0]
        result = score(scenes, generate(pipeline, scenes, guidance_scale=3.0, steps=25))
        found[name] = {"chalk": 100 * (1 - result["filled"]), "right": 100 * result["shape and color"]}
    return found


def measure_all(folder):
    """{label: {scale: [one result a seed]}}; what was measured before is read again."""
    pipeline = open_pipeline("models/mini-sd", scheduler="dpm++")
    kept = folder / "base.json"
    if not kept.is_file():
        write_json(kept, measured(pipeline))
    base = json.loads(kept.read_text(encoding="utf-8"))
    results = {}
    for run in sorted(folder.glob("*-rank-*-[0-9]"), key=lambda run: [int(n) for n in re.findall(r"\d+", run.name)]):
        kept = run / "measured.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if len(known) < len(SCALES):
            attach(pipeline, read_lora(run, adaptable_components(pipeline)))
            for scale in SCALES:
                set_scale(pipeline, scale)
                known[str(scale)] = measured(pipeline)
                print(run.name, scale, known[str(scale)], flush=True)
            detach(pipeline)
            write_json(kept, known)
        label = run.name.rsplit("-", 1)[0]
        for scale in SCALES:
            results.setdefault(label, {}).setdefault(scale, []).append(known[str(scale)])
        results[label][0.0] = [base]
    return dict(sorted(results.items(), key=lambda item: (item[0].split("-")[0], int(item[0].split("-")[-1]))))


def mean_and_range(values):
    spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.0f} %{spread}"


def table(results):
    """Markdown: a line for each kind of adapter, a column for each scale, style learned / shapes kept."""
    scales = (0.0, *SCALES)
    lines = [
        "| adapters | " + " | ".join(f"scale {scale:g}" for scale in scales) + " |",
        "|---" * (len(scales) + 1) + "|",
    ]
    for title, kind, figure in (
        ("chalk, shapes shown", "shown", "chalk"),
        ("right, shapes shown", "shown", "right"),
        ("right, shapes left out", "left_out", "right"),
    ):
        lines.append(f"| **{title}** |" + " |" * len(scales))
        for label, by_scale in results.items():
            cells = [mean_and_range([one[kind][figure] for one in by_scale[scale]]) for scale in scales]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Style learned against shapes kept: a line for each kind of adapter, a point for each scale."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for label, by_scale in results.items():
        mean = lambda kind, what, scale, own=by_scale: sum(one[kind][what] for one in own[scale]) / len(own[scale])
        scales = sorted(by_scale)
        style = dict(marker="o", markersize=4, linestyle="-" if label.startswith("everywhere") else "--")
        xs, ys = ([mean(*what, scale) for scale in scales] for what in (("shown", "chalk"), ("left_out", "right")))
        axes.plot(xs, ys, label=label, **style)
    axes.set(xlabel="style learned: objects drawn in chalk, shapes shown (%)")
    axes.set(ylabel="kept: right in shape and colour, shapes left out (%)")
    axes.set(title="scales 0, 0.25, ... 1.25 along each line, mean of three seeds", xlim=(-2, 102), ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    everything = measure_all(Path(sys.argv[1]))
    plot(everything, HERE / "learned_and_kept.png")
    print(table(everything))
