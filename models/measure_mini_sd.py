"""How often a model shows what was asked, on combinations that it was never trained on, read off the pixels.

    python -m models.measure_mini_sd --model models/mini-sd --output_dir build/mini-sd/accuracy

Reads a pipeline (or a checkpoint). Writes accuracy.json, accuracy.md (the table of the model card) and samples.png.
"""

import argparse
import math
import random
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from finetuning.evaluation.grid import labelled_grid
from finetuning.families import generation
from finetuning.families.pipelines import SCHEDULERS, open_pipeline
from finetuning.files import write_json
from finetuning.rng import torch_generator
from finetuning.shapes.checker import agrees, read, scores
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import SHAPES, draw_scene, single_scenes

PARTS = ("shape", "color", "size", "background", "axis", "relation", "count", "all")


def held_out_scenes(count, shapes=SHAPES):
    """(single, pairs), half of `count` each; single combinations are gone through evenly, pairs are all different."""
    rng = random.Random(0)
    singles = [scene for scene in single_scenes(shapes) if scene.is_held_out]
    rng.shuffle(singles)
    singles = [singles[index % len(singles)] for index in range(count // 2)]
    pairs = {}
    while len(pairs) < count // 2:
        scene = draw_scene(rng, shapes, pair_share=1.0, held_out=True)
        pairs[scene.caption] = scene
    return singles, list(pairs.values())


def generate(pipeline, scenes, guidance_scale, steps, batch_size=64, seed=0):
    """A PIL image for each scene; image number i always starts from the same noise."""
    generators = [torch_generator(seed, "accuracy", number) for number in range(len(scenes))]
    images = generation.generate(
        pipeline, [scene.caption for scene in scenes], generators, batch_size=batch_size, guidance_scale=guidance_scale,
        num_inference_steps=steps,
    )  # fmt: skip
    return list(tqdm(images, total=len(scenes), leave=False))


def score(scenes, images):
    """{part: share right} with n, "shape and color" together, and the share of things drawn filled."""
    judged = [agrees(scene, image) for scene, image in zip(scenes, images, strict=True)]
    shares = {part: sum(map(bool, (one[part] for one in judged))) / len(judged) for part in PARTS}
    shares["shape and color"] = sum(one["shape"] and one["color"] for one in judged) / len(judged)
    things = [one for image in images for one in read(image)[1]]
    shares["filled"] = sum(one.style == "filled" for one in things) / max(1, len(things))
    return {"n": len(judged)} | shares


def chalk_and_right(pipeline, shapes, captions=128):
    """A number for each held-out caption with one of `shapes`: share of things drawn in chalk; 1.0 if shape and colour
    are right. What the entries in experiments/ measure.
    """
    scenes = held_out_scenes(2 * captions, shapes)[0]
    images = generate(pipeline, scenes, guidance_scale=3.0, steps=25)
    found = [scores(image, scene.caption) for scene, image in zip(scenes, images, strict=True)]
    return {"chalk": [one["style"] for one in found], "right": [one["shapes"] for one in found]}


def interval(share, n):
    """Wilson's 95 % interval of a share."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def table(results):
    """Markdown, a line for each set of captions."""
    columns = ("shape and color", "shape", "color", "size", "background", "axis", "relation", "count", "all", "filled")
    lines = ["| captions | n | " + " | ".join(columns) + " |", "|---|---" + "|---" * len(columns) + "|"]
    for name, result in results.items():
        low, high = interval(result["shape and color"], result["n"])
        cells = [f"{result[column]:.1%}" for column in columns]
        cells[0] = f"**{cells[0]}** ({low:.1%} to {high:.1%})"
        lines.append(f"| {name} | {result['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", help="for a checkpoint folder: where its other parts come from")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run or a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=512, help="half of them singles (default %(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="ask for these only (default: all)")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--scheduler", choices=tuple(SCHEDULERS), default="dpm++")
    args = parser.parse_args()

    pipeline = open_pipeline(
        args.model, weights=args.weights, base=args.base, scheduler=args.scheduler, device=PartialState().device
    )
    sets = dict(zip(("one object", "two objects"), held_out_scenes(args.captions, args.shapes), strict=True))
    results, samples = {}, []
    for name, scenes in sets.items():
        drawn = [draw(scene, number) for number, scene in enumerate(scenes)]
        results[f"{name}, rendered truth (the checker itself)"] = score(scenes, drawn)
        images = generate(pipeline, scenes, args.guidance_scale, args.num_inference_steps)
        results[f"{name}, generated"] = score(scenes, images)
        samples += list(zip(scenes, images, strict=True))[:16]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "accuracy.json", results)
    (args.output_dir / "accuracy.md").write_text(table(results), encoding="utf-8")
    rows = [[image for _, image in samples[start : start + 8]] for start in range(0, len(samples), 8)]
    labelled_grid(rows, [], [], scale_to=128).save(args.output_dir / "samples.png")
    print(table(results))
    print("\n".join(f"{number}. {scene.caption}" for number, (scene, _) in enumerate(samples)))


if __name__ == "__main__":
    main()
