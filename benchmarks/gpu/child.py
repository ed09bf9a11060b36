"""Run a script as its command line does, count its optimizer steps, and write what they cost.

    GPU_CHECK_REPORT=report.json python benchmarks/gpu/child.py train_text_to_image.py --train_data_dir ...

On a GPU the training scripts' first two steps are their rehearsal. Reads from the environment, beside the report:
    GPU_CHECK_STOP_AFTER=25     end the process after this many optimizer steps, before anything is saved
    GPU_CHECK_KILL_AT=25        end it at this step as `kill -9` does
    GPU_CHECK_MEMORY_GB=14.5    let PyTorch allocate no more than this on the GPU
    GPU_CHECK_WAITS=1           once warm, have PyTorch warn of each place where the CPU waits for the GPU
    GPU_CHECK_PROFILE=FILE      profile five steps, from the tenth, and write the most expensive operations
    GPU_CHECK_LOCK=FILE         run one script at a time: only the imports overlap with another's loading and warm-up
"""

import fcntl
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

START = time.time()
WARM_UP = 5  # steps that are not timed: kernels are chosen, memory is allocated, the loss scaler finds its scale
PROFILED = range(10, 15)
IMPORTS = (
    "torch", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.training_utils",
    "transformers.models.clip.modeling_clip", "accelerate", "datasets", "peft", "torchvision.transforms.v2",
)  # fmt: skip


def setting(name, default=None):
    """A variable of the environment, of which an empty one counts as unset."""
    return os.environ.get(f"GPU_CHECK_{name}") or default


def hold(name, how=fcntl.LOCK_EX):
    """Wait for a lock among the processes of GPU_CHECK_LOCK; closing the file frees it, and the process's end."""
    file = open(f"{setting('LOCK')}.{name}", "w", encoding="utf-8")  # noqa: SIM115
    fcntl.flock(file, how)
    return file


class Watch:
    """Called after every optimizer step: when it was, and whether to stop there."""

    def __init__(self):
        self.times, self.ready = [], START
        self.stop_after, self.kill_at = int(setting("STOP_AFTER", 0)), int(setting("KILL_AT", 0))
        self.profiler, self.locks = None, []

    def step(self, *_):
        import torch

        done = len(self.times) + 1
        if setting("LOCK") and done == WARM_UP:
            # Small steps wait for the CPU: nobody imports while they are timed. `turn` keeps new imports from starting.
            self.locks += [hold("turn"), hold("quiet")]
        if torch.cuda.is_available() and done in (1, WARM_UP, self.stop_after):
            torch.cuda.synchronize()
        self.times.append(time.time())
        if done == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if setting("WAITS") and torch.cuda.is_available() and done == WARM_UP:
            torch.cuda.set_sync_debug_mode("warn")
        if setting("PROFILE"):
            self.profile(done, torch)
        if done == self.stop_after:
            self.write()
            os._exit(0)

    def profile(self, done, torch):
        """Start before, and stop after the profiled steps."""
        if done == PROFILED.start:
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()
        elif done == PROFILED.stop:
            self.profiler.__exit__(None, None, None)
            averages = self.profiler.key_averages()
            orders = ["self_cuda_time_total"] * torch.cuda.is_available() + ["self_cpu_time_total"]
            tables = [f"{len(PROFILED)} steps, by {by}\n{averages.table(sort_by=by, row_limit=40)}" for by in orders]
            Path(setting("PROFILE")).write_text("\n".join(tables), encoding="utf-8")

    def write(self):
        """The report: seconds, steps, memory."""
        import torch

        report = {
            "seconds": round(time.time() - START, 2),
            "seconds_imports": round(self.ready - START, 2),
            "steps": len(self.times),
            "seconds_to_first_step": round(self.times[0] - self.ready, 2) if self.times else None,
            "step_times": [
                round(later - earlier, 4) for earlier, later in zip(self.times, self.times[1:], strict=False)
            ],
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            report["gb_allocated"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            report["gb_reserved"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        if setting("REPORT"):
            Path(setting("REPORT")).write_text(json.dumps(report), encoding="utf-8")


def main():
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    watch = Watch()
    if setting("LOCK"):
        for name in IMPORTS:
            with hold("turn"):
                importing = hold("quiet", fcntl.LOCK_SH)
            with importing:
                importlib.import_module(name)
        watch.locks = [hold("script")]  # until the process ends
    import torch
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if Path(script).name == "sd15.py":
        register_optimizer_step_post_hook(watch.step)
    else:  # --fused_backward_pass has an optimizer's step for each weight, but one of accelerate's
        step = AcceleratedOptimizer.step
        AcceleratedOptimizer.step = lambda *given: (step(*given), watch.step())
    watch.ready = time.time()
    if setting("MEMORY_GB") and torch.cuda.is_available():
        share = float(setting("MEMORY_GB")) * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        watch.write()


if __name__ == "__main__":
    main()
