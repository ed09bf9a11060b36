"""How fast the figures of evaluate_model.py are, beside torch-fidelity's own command: the table of README.md.

    PYTHONPATH=. python benchmarks/metrics/run.py [--images 64] [--side 256] [--rounds 3] [--workers N]

Makes two folders of images and random weights of the networks. Then runs in alternation, each kind in its own
process: torch-fidelity's command for FID and KID; this project's FID and KID with torch-fidelity's resize and with
clean-fid's; LPIPS; the CLIP score. All on the CPU, without a cache, from files to figures: the loading of the weights
counts, the imports do not. The FID with torch-fidelity's resize must be that of its command. Prints a Markdown table of
medians.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

KINDS = {
    "torch-fidelity": "torch-fidelity's command, FID and KID",
    "tf": "FID and KID, torch-fidelity's resize",
    "clean": "FID and KID, clean-fid's resize",
    "lpips": "LPIPS (AlexNet), pairs",
    "clip": "CLIP score (ViT-B/32), with captions",
}


# -- the files -------------------------------------------------------------------------------------------------------


def make_images(folder, count, side):
    """drawn/ and truth/: smooth colours under fine noise, of another coarseness and tint in each."""
    random = np.random.default_rng(0)
    for name, patches, tint in (("drawn", 16, (150, 190, 250)), ("truth", 8, (250, 200, 150))):
        (folder / name).mkdir()
        for number in range(count):
            patch = (random.random((patches, patches, 3)) * tint).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(patch).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = (smooth + random.normal(0, 8, (side, side, 1))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{number:05d}.png")


def make_weights(folder):
    """inception (.pth and .safetensors), alexnet.safetensors and clip/: random; features neither vanish nor explode."""
    from safetensors.torch import save_file  # each process imports no more than it needs
    from torch_fidelity import feature_extractor_inceptionv3 as peer
    from torchvision.models import alexnet
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from models.make_start import vocabulary

    torch.manual_seed(0)
    peer.load_state_dict_from_url = lambda *_, **__: {}
    peer.FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
    inception = peer.FeatureExtractorInceptionV3("random", ["2048"])
    for weights in inception.parameters():
        if weights.dim() > 1:
            torch.nn.init.kaiming_normal_(weights, nonlinearity="relu")
    torch.save(inception.state_dict(), folder / "inception.pth")  # for the peer
    save_file(inception.state_dict(), folder / "inception.safetensors")
    save_file(alexnet().features.state_dict(prefix="features."), folder / "alexnet.safetensors")
    entries, merges = vocabulary()
    CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")  # the default is ViT-B/32
    CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer(vocab=entries, merges=merges)).save_pretrained(folder / "clip")


# -- what is measured ------------------------------------------------------------------------------------------------


def prepare_peer(folder):
    """A function that runs torch-fidelity's command and returns its FID; it chooses its workers itself."""
    from torch_fidelity import fidelity

    count = len(list((folder / "drawn").iterdir()))
    sys.argv = ["fidelity", "--cpu", "--json", "--silent", "--no-cache", "--fid", "--kid"]
    sys.argv += ["--input1", f"{folder / 'drawn'}", "--input2", f"{folder / 'truth'}"]
    sys.argv += ["--kid-subsets", "1", "--kid-subset-size", f"{count}"]
    sys.argv += ["--feature-extractor-weights-path", f"{folder / 'inception.pth'}"]

    def command():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            fidelity.main()
        return json.loads(printed.getvalue())["frechet_inception_distance"]

    return command


def prepare_sets(folder, workers, protocol):
    """A function that computes FID and KID as evaluate_model.py does, and returns the FID."""
    from finetuning.evaluation.networks import features_of, inception
    from finetuning.evaluation.statistics import frechet, kernel_influence

    def figures():
        network, weights = inception(folder / "inception.safetensors", "cpu")
        sets = []
        for name in ("drawn", "truth"):
            paths = sorted((folder / name).iterdir())
            side = Image.open(paths[0]).width
            sets.append(features_of(paths, side, network, protocol, weights, None, 16, workers, "cpu"))
        kernel_influence(*sets)
        return frechet(*sets)

    return figures


def prepare_rows(folder, workers, metric):
    """A function that takes LPIPS or the CLIP score of every image."""
    from finetuning.evaluation.generation import Row
    from finetuning.evaluation.measuring import EvalNetworkArgs, measure, open_networks

    args = EvalNetworkArgs(
        metrics=[metric], lpips_trunk=f"{folder / 'alexnet.safetensors'}", clip_model=f"{folder / 'clip'}",
        num_workers=workers,
    )  # fmt: skip
    paths = enumerate(sorted((folder / "truth").iterdir()))
    rows = [Row(number, "a small red circle on a white background", path) for number, path in paths]
    drawn = {"drawn": {row.number: folder / "drawn" / row.image.name for row in rows}}
    return lambda: measure(rows, drawn, open_networks(args), args) and None


def measure_kind(kind, folder, workers):
    """Run one kind in this process; prints its seconds, those of all cores together, and its FID if it has one."""
    match kind:
        case "torch-fidelity":
            work = prepare_peer(folder)
        case "tf" | "clean":
            work = prepare_sets(folder, workers, kind)
        case "lpips":
            work = prepare_rows(folder, workers, "lpips")
        case "clip":
            work = prepare_rows(folder, workers, "clip_score")
    start, start_cpu = time.perf_counter(), sum(os.times()[:4])  # with the workers, which are children
    fid = work()
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu": sum(os.times()[:4]) - start_cpu, "fid": fid}))


# -- the table -------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="in each of the two folders")
    parser.add_argument("--side", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count()), help="of this project's kinds")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure_kind(args.measure[0], Path(args.measure[1]), args.workers)
    results = {kind: [] for kind in args.kinds}
    with tempfile.TemporaryDirectory() as below:
        make_images(Path(below), args.images, args.side)
        make_weights(Path(below))
        for _ in range(args.rounds):
            for kind in args.kinds:
                command = [sys.executable, __file__, "--workers", f"{args.workers}", "--measure", kind, below]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    check(results)
    print(table(results, args))


def check(results):
    """The same images, weights and resize have the same FID."""
    peer, own = (results[kind][0]["fid"] if kind in results else None for kind in ("torch-fidelity", "tf"))
    if peer and own and abs(own - peer) > 1e-5 * peer:
        raise SystemExit(f"FID is {own} here and {peer} by torch-fidelity: they do not compute the same")


def table(results, args):
    images = {kind: args.images * (1 if kind == "clip" else 2) for kind in results}
    median = {
        kind: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu")}
        for kind, runs in results.items()
    }
    speed = {kind: images[kind] / one["seconds"] for kind, one in median.items()}
    lines = [
        f"\n2 x {args.images} images of {args.side} px, {os.cpu_count()} cores, {args.workers} workers; "
        f"median (least to most) of {args.rounds} rounds\n",
        "| | images | seconds | images/s | of torch-fidelity's | CPU ms an image |",
        "|---|---|---|---|---|---|",
    ]
    for kind, one in median.items():
        seconds = [run["seconds"] for run in results[kind]]
        share = f"{speed[kind] / speed['torch-fidelity']:.2f} x" if "torch-fidelity" in speed else ""
        lines.append(
            f"| {KINDS[kind]} | {images[kind]} | {one['seconds']:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{speed[kind]:.1f} | {share} | {1000 * one['cpu'] / images[kind]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
