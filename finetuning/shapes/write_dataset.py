"""Write a captioned image folder of the shapes world.

    python -m finetuning.shapes.write_dataset --output datasets/chalk --style chalk --train 600 --validation 64

Writes train/ and validation/ (where their number is above 0), each with PNG files and its metadata.jsonl. The same
command gives the same bytes. Combinations that are held out (finetuning/shapes/scenes.py) never enter train/;
validation/ is made of them alone.
"""

import argparse
import json
import random
from pathlib import Path

from finetuning.shapes.drawing import STYLES, draw
from finetuning.shapes.scenes import SHAPES, SIDE, draw_scene


def write(folder: Path, count, styles, shapes, pair_share, held_out, seed, side=SIDE):
    """Write `count` images and their metadata.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed} {folder.name}")
    lines = []
    for index in range(count):
        scene = draw_scene(rng, shapes, pair_share, held_out)
        name = f"{index:05d}.png"
        draw(scene, rng.randrange(2**31), styles[index % len(styles)], side).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--style", nargs="+", choices=STYLES, default=["filled"], help="several take turns")
    parser.add_argument("--train", type=int, required=True, help="images in train/")
    parser.add_argument("--validation", type=int, default=0, help="images in validation/ (default %(default)s)")
    parser.add_argument("--leave_out", nargs="*", choices=SHAPES, default=[], help="shapes that never appear")
    parser.add_argument("--pair_share", type=float, default=0.5, help="share with two things (default %(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, help="of the images, in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape not in args.leave_out]
    for split, count, held_out in (("train", args.train, False), ("validation", args.validation, True)):
        if count:
            write(args.output / split, count, args.style, shapes, args.pair_share, held_out, args.seed, args.side)


if __name__ == "__main__":
    main()
