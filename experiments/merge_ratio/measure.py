"""Generate with every mixture of base and fine-tuned weights, read the images' pixels, write the table and the plot.

python experiments/merge_ratio/measure.py runs/merge_ratio
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

from finetuning.families.pipelines import open_pipeline
from finetuning.files import write_json
from finetuning.merging import frontier
from finetuning.merging.methods import weighted_sum
from finetuning.shapes.scenes import SHAPES
from models.measure_mini_sd import chalk_and_right

RATIOS = [tenth / 10 for tenth in range(11)]
SHOWN, LEFT_OUT = SHAPES[:4], SHAPES[4:]  # datasets/chalk has no cross and no star
KINDS = {"raw": "unet", "averaged": "unet_ema"}
HERE = Path(__file__).parent


@torch.no_grad()
def put(unet, base, tuned, ratio):
    """The weights at `ratio` of the way from `base` to `tuned` into the UNet; at 0 and 1 they are the one's own."""
    for name, parameter in unet.state_dict().items():
        ends = {0: base[name], 1: tuned[name]}
        parameter.copy_(ends[ratio] if ratio in ends else weighted_sum(base[name], tuned[name], ratio=ratio))


def measured(pipeline):
    """Of 128 captions of shapes shown, and 128 of shapes left out."""
    return {"shown": chalk_and_right(pipeline, SHOWN), "left_out": chalk_and_right(pipeline, LEFT_OUT)}


def measure_all(folder):
    """{(kind, seed): {ratio: measured}}; what was measured before is read again."""
    pipeline = open_pipeline("models/mini-sd", scheduler="dpm++")
    base = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    results = {}
    for run in sorted(folder.glob("tuned-[0-9]")):
        for kind, part in KINDS.items():
            kept = run / f"{kind}.json"
            known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
            place = run / "checkpoint-500" / part
            tuned = diffusers.UNet2DConditionModel.from_pretrained(place, use_safetensors=True).state_dict()
            for ratio in RATIOS:
                if str(ratio) not in known:
                    put(pipeline.unet, base, tuned, ratio)
                    known[str(ratio)] = measured(pipeline)
                    write_json(kept, known)
            results[kind, int(run.name[-1])] = {ratio: known[str(ratio)] for ratio in RATIOS}
    return results


def rows(one_run, kind, what):
    """Per cent [ratios, captions]."""
    return 100 * np.array([one_run[ratio][kind][what] for ratio in RATIOS])


def table(results):
    """Markdown: a line for each ratio, means over the seeds with their range, raw and averaged weights."""
    columns = (("shown", "chalk"), ("shown", "right"), ("left_out", "right"))
    lines = ["| ratio |" + " chalk | right, shown | right, left out |" * 2, "|---" * 7 + "|"]
    for index, ratio in enumerate(RATIOS):
        cells = []
        for weights in KINDS:
            for kind, what in columns:
                means = [rows(run, kind, what)[index].mean() for (name, _), run in results.items() if name == weights]
                spread = f" ({min(means):.0f} to {max(means):.0f})" if max(means) - min(means) >= 0.5 else ""
                cells.append(f"{np.mean(means):.0f} %{spread}")
        lines.append(f"| {ratio:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves(results):
    """{kind of weights: frontier of the captions' means over the seeds}."""
    found = {}
    for weights in KINDS:
        runs = [run for (name, _), run in results.items() if name == weights]
        learned, retained = (
            np.mean([rows(run, *measure) for run in runs], axis=0)
            for measure in (("shown", "chalk"), ("left_out", "right"))
        )
        found[f"{weights} weights"] = frontier.summary(RATIOS, learned, retained)
    return found


if __name__ == "__main__":
    everything = measure_all(Path(sys.argv[1]))
    means = curves(everything)
    axes = "learned: drawn in chalk, shapes shown (%)", "retained: right in shape and colour, shapes left out (%)"
    frontier.plot(means, HERE / "learned_and_kept.png", *axes)
    print(table(everything))
    for label, summary in means.items():
        print(f"{label}: {summary['knee']['sentence']}")
    for (weights, seed), run in everything.items():
        own = frontier.summary(RATIOS, rows(run, "shown", "chalk"), rows(run, "left_out", "right"))
        print(f"{weights} weights, seed {seed}: knee at {own['knee']['ratio']}, Pareto {own['pareto']}")
