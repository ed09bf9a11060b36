"""What a training step costs on a CPU beside the bare UNet loop, and how that grows: the tables of README.md.

    PYTHONPATH=. python benchmarks/train/run.py [--repeats 5] [--steps 20] [--official FILE] [--only NAME ...]

Each case is a script in a process of its own, by its command line. After every optimizer step of it one step of the
bare loop follows in the same process, so that a busy machine slows both alike: the same UNet, batch and optimizer, on
latents and text that lie there ready, without noise to draw, loss to log or gradient to name. Measured are CPU seconds;
the ratio is that of the medians of a process, and the processes of all cases take turns. Writes results.json.
`--official` is diffusers' own examples/text_to_image/train_text_to_image.py.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/mini-sd"
WARM_UP = 4  # steps that are not counted


# -- in the process that is measured -----------------------------------------------------------------------------------


def measure(report, steps, batch, side, script, arguments):
    """Run the script until `steps` steps are counted, a bare one after each, and write what they took to `report`."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    own, bare, state = [], [], {}

    def after_a_step(*_):
        if state.get("bare"):
            return
        now = time.process_time()
        if not own:
            state["first"], state["step"] = now, bare_loop(batch, side)
        own.append(now - state.get("last", now))
        state["bare"] = True
        state["step"]()
        state["bare"], state["last"] = False, time.process_time()
        bare.append(state["last"] - now)
        if len(own) == WARM_UP + steps:
            times = {"own": own[WARM_UP:], "bare": bare[WARM_UP:], "to_first_step": state["first"]}
            if os.environ.get("RANK", "0") == "0":
                report.write_text(json.dumps(times), encoding="utf-8")
            os._exit(0)

    register_optimizer_step_post_hook(after_a_step)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def bare_loop(batch, side):
    """A call that trains the UNet for one step, with the least that can be done."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    tokens = json.loads((MODEL / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    noisy, noise = torch.randn(2, batch, unet.config.in_channels, side // 8, side // 8)
    text, timesteps = torch.randn(batch, tokens, unet.config.cross_attention_dim), torch.randint(0, 1000, (batch,))

    def step():
        predicted = unet(noisy, timesteps, text, return_dict=False)[0]
        (predicted - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# -- the cases ---------------------------------------------------------------------------------------------------------


def cases(args, scratch):
    """{name: (batch, side, processes, script, arguments)}."""
    chalk = ROOT / "datasets/chalk"

    def ours(batch=16, side=64, flags="", data=chalk, processes=1, script="train_text_to_image.py"):
        words = f"""--pretrained_model_name_or_path {MODEL} --train_data_dir {data} --resolution {side} --center_crop
            --train_batch_size {batch} --max_train_steps 100000 --seed 7 --report_to none --validation_epochs 0
            --validation_loss_rows 0 --checkpointing_steps 0 --max_train_samples 64 {flags}"""
        return batch, side, processes, str(ROOT / script), words.split()

    live = "--no-cache_latents"
    found = {"cached": ours(), "live": ours(flags=live)}
    if args.official:
        words = f"""--pretrained_model_name_or_path {MODEL} --train_data_dir {chalk / "train"} --caption_column text
            --resolution 64 --center_crop --train_batch_size 16 --max_train_steps 100000 --seed 7
            --max_train_samples 64 --cache_dir {scratch / "hub"}"""
        found["official"] = 16, 64, 1, str(args.official), words.split()
    found |= {f"batch {batch}": ours(batch) for batch in (1, 4)}
    found |= {f"{side} pixels": ours(4, side) for side in (32, 128)}
    found["buckets"] = ours(flags="--aspect_buckets --bucket_step 16")
    found["LoRA"] = ours(script="train_lora.py", flags="--rank 8")
    found["EMA"] = ours(flags="--use_ema")
    found["2 processes of 8"] = ours(8, processes=2)
    make = runpy.run_path(str(ROOT / "benchmarks/million_rows/run.py"))["make"]
    for rows in args.rows:
        folder = scratch / str(rows)
        found[f"live, {rows:,} rows"] = ours(
            flags=f"{live} --max_train_samples {rows} --check_images none", data=folder
        )
        if not args.only or f"live, {rows:,} rows" in args.only:
            make(folder, rows)
    return {name: case for name, case in found.items() if not args.only or name in args.only}


def run(case, steps, scratch):
    """What one process of a case measured."""
    batch, side, processes, script, arguments = case
    report, output = scratch / "report.json", scratch / f"output-{time.time()}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    own = [__file__, "--measure", report, steps, batch, side, script, *arguments, "--output_dir", output]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT),
        "FINETUNING_CACHE": str(scratch / "cache"),
    }  # fmt: skip
    command = list(map(str, [sys.executable, *launcher, *own]))
    report.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.is_file():
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(report.read_text(encoding="utf-8"))


def main():
    if "--measure" in sys.argv:
        report, steps, batch, side, script, *arguments = sys.argv[2:]
        measure(Path(report), int(steps), int(batch), int(side), script, arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each case")
    parser.add_argument("--steps", type=int, default=20, help="steps that are counted in each process")
    parser.add_argument("--official", type=Path, help="diffusers' own train_text_to_image.py, to compare with")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", help="cases by name")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plan, times = cases(args, Path(scratch)), {}
        for repeat in range(args.repeats):
            for name, case in plan.items():
                times.setdefault(name, []).append(run(case, args.steps, Path(scratch)))
                print(f"{repeat + 1}/{args.repeats} {name}: {ratio(times[name][-1]):.3f}", file=sys.stderr, flush=True)
    facts = {
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M"), "cores": os.cpu_count(),
        "load": os.getloadavg(), "versions": {name: version(name) for name in ("torch", "diffusers")},
    }  # fmt: skip
    args.output.write_text(json.dumps({**facts, "cases": times}, indent=1) + "\n", encoding="utf-8")
    print(table(plan, times))


def ratio(one):
    """CPU seconds of a step, in those of the bare loop beside it."""
    return statistics.median(one["own"]) / statistics.median(one["bare"])


def table(plan, times):
    """Markdown: the median over the processes, with the least and the most."""
    lines = [
        "| case | CPU seconds a step | a row | of the bare loop | CPU seconds to the first step, cold and warm |",
        "|---|---|---|---|---|",
    ]
    for name, runs in times.items():
        seconds = statistics.median(statistics.median(one["own"]) for one in runs)
        ratios, starts = [ratio(one) for one in runs], [one["to_first_step"] for one in runs]
        warm = f", {statistics.median(starts[1:]):.0f}" if len(starts) > 1 else ""
        lines.append(
            f"| {name} | {seconds:.3f} | {seconds / plan[name][0]:.4f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {starts[0]:.0f}{warm} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
