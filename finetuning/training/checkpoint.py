"""Checkpoints that are whole or not there, and resuming from them to the last bit.

checkpoint-N/
    unet/ (text_encoder/)              the trained weights, in diffusers layout: from_pretrained loads them
    unet_ema/ (text_encoder_ema/)      the averaged weights, likewise
    lora/ lora_ema/                    of train_lora.py in their place: adapters, which load_lora_weights loads
    optimizer.pt                       moments, and the fp16 loss scale
    training_state.json                step, arguments, dataset, versions
    manifest.json                      size and hash of every file
Nothing else is needed: every draw, the row order and the learning rate are functions of the step.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.cli import UserError, as_dict, flag, flags_without_effect
from finetuning.families.sharding import gathered, local
from finetuning.families.tensors import read_json
from finetuning.files import (
    BrokenFolder,
    atomic_folder,
    check_manifest,
    output_problems,
    remove_leftovers,
    write_json,
    writing,
)
from finetuning.training.optim import load_optimizer

# 2: crops are drawn apart from the image, and the dropout of adapters once for each step (1: per image and row)
DRAWS = 2


@dataclass
class CheckpointArgs:
    """Checkpoints and resuming"""

    affects_result = False

    checkpointing_steps: int = flag(
        500, "write a checkpoint every N optimizer steps; 0: only by the other two, and at the end", min=0
    )
    checkpointing_epochs: int = flag(0, "write a checkpoint every N epochs", min=0)
    checkpointing_minutes: float = flag(
        0.0, "write a checkpoint every N minutes (miniGLIDE's checkpoint-time, in minutes)", min=0
    )
    checkpoints_total_limit: int | None = flag(
        None, "keep the newest N checkpoints; older ones are deleted after the new one is complete", min=1
    )
    resume_from_checkpoint: str | None = flag(
        None, '"latest" (the newest complete checkpoint of --output_dir), or a checkpoint folder'
    )

    def problems(self):
        if self.resume_from_checkpoint not in (None, "latest"):
            yield from output_problems(self.output_dir, [self.resume_from_checkpoint])


def checkpoints_in(folder):
    """[(step, path)] of every checkpoint-N, oldest first. Other names (checkpoint-best) are not ours to touch."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def harmless_flags():
    """The names of all training flags that cannot change what a run computes, for a run whose script is not known."""
    from finetuning.data.buckets import BucketArgs
    from finetuning.data.cache import CacheArgs
    from finetuning.data.captions import CaptionArgs
    from finetuning.data.streams import StreamArgs
    from finetuning.data.training_set import DataArgs
    from finetuning.diffusion.objective import NoiseArgs
    from finetuning.families.model_args import ModelArgs, StartArgs
    from finetuning.training.ema import EMAArgs
    from finetuning.training.evaluator import RetentionArgs, ValidationArgs
    from finetuning.training.lora_layout import LoraArgs
    from finetuning.training.optim import OptimArgs
    from finetuning.training.preflight import PreflightArgs
    from finetuning.training.run import RunArgs

    groups = (
        RunArgs, RetentionArgs, ValidationArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, CacheArgs, BucketArgs,
        CaptionArgs, StreamArgs, DataArgs, LoraArgs, StartArgs, ModelArgs, PreflightArgs,
    )  # fmt: skip
    return frozenset().union(*map(flags_without_effect, groups))


def seed_of_resumed_run(args):
    """The seed that the run to be resumed drew for itself, or None where there is none to be found."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    named = [] if wanted == "latest" else [Path(wanted), Path(args.output_dir) / wanted]
    for folder in [*named, *(path for _, path in reversed(checkpoints_in(args.output_dir)))]:
        try:
            return json.loads((folder / "training_state.json").read_text(encoding="utf-8"))["args"]["seed"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a broken checkpoint is reported when it is loaded
    return None


class CheckpointError(UserError):
    """A checkpoint that was asked for cannot be used; the message says why and what to do."""


class NonFinite(UserError):
    """A loss, a gradient or a weight is not a number; nothing of it has reached a checkpoint."""


class Checkpointer:
    """Writes and reads the state of one run. `due` is asked after each step, `save` writes;
    `resume` finds what to go back to, `load` does."""

    def __init__(self, args: CheckpointArgs, model, ema, optimizer, run, data):
        self.args, self.model, self.ema, self.optimizer = args, model, ema, optimizer
        self.run, self.say = run, run.say
        self.steps_per_epoch, self.dataset_id = data.batch_sampler.steps_per_epoch or 0, data.training.fingerprint()
        self.folder = Path(args.output_dir)
        self.written_at = time.monotonic()
        self.last_saved = None
        self.found = None  # folder and state of the checkpoint to resume from
        if run.is_main:
            remove_leftovers(self.folder)
        run.wait_for_everyone()

    def due(self, step):
        """Whether a checkpoint belongs after `step` optimizer steps."""
        args = self.args
        by_steps = args.checkpointing_steps and step % args.checkpointing_steps == 0
        epoch_length = self.steps_per_epoch * args.checkpointing_epochs
        return bool(by_steps or (epoch_length and step % epoch_length == 0) or self.time_is_up())

    def time_is_up(self):
        """Whether --checkpointing_minutes have passed on this process's clock."""
        minutes = self.args.checkpointing_minutes
        return bool(minutes) and time.monotonic() - self.written_at >= 60 * minutes

    def save(self, step):
        """Write checkpoint-`step`, then delete what --checkpoints_total_limit has no room for.

        The main process writes; the others wait, because one that ends first would have the launcher end them all.
        """
        self.written_at = time.monotonic()
        weights = self.model.trained_parameters()
        broken = self.run.gathered([name for name, value in weights.items() if not local(value).isfinite().all()])
        if broken:
            raise NonFinite(
                f"after step {step} {len(set(broken))} weights are not finite, {broken[0]} first: no checkpoint is "
                f"written. Lower --learning_rate. {self.advice()}"
            )
        if self.last_saved != step:
            state = gathered([weights, self.ema.shadow, self.optimizer.state_dict()], keep=self.run.is_main)
            if self.run.is_main:
                self._write(step, *state)
                self._prune(step)
        self.last_saved = step
        self.run.wait_for_everyone()

    def advice(self):
        """How to go on after a failure."""
        newest = checkpoints_in(self.folder)[-1:]
        if not newest:
            return "There is no checkpoint yet: start again in a new --output_dir, or delete this one"
        return f"{newest[0][1]} is complete: --resume_from_checkpoint latest goes on from it"

    def _write(self, step, weights, average, optimizer):
        scaler = self.run.scaler
        with atomic_folder(self.folder / f"checkpoint-{step}") as folder:
            self.model.save_trained(folder, weights)
            if average is not None:
                self.model.save_trained(folder, average, "_ema")
            state = {"optimizer": optimizer, "scaler": scaler.state_dict() if scaler else None}
            with writing(folder / "optimizer.pt"):
                torch.save(state, folder / "optimizer.pt")
            write_json(folder / "training_state.json", self._state(step))

    def resume(self, total_steps):
        """Find what --resume_from_checkpoint asks for; the number of optimizer steps that are done.

        Raises CheckpointError where it cannot be used, or where the run is already longer than it should become.
        """
        wanted = self.args.resume_from_checkpoint
        if wanted is None:
            self._refuse_older_checkpoints()
            return 0
        folder = self._latest() if wanted == "latest" else self._named(wanted)
        if folder is None:
            self.say(f"there is no checkpoint in {self.folder}: starting afresh")
            return 0
        state = self._state_in(folder)
        if state["step"] > total_steps:
            raise CheckpointError(
                f"{folder} has {state['step']} steps done and this run would end at {total_steps}: raise "
                "--max_train_steps, or name an older checkpoint"
            )
        self._compare_flags(state, folder)
        self.found = folder, state
        return state["step"]

    def load(self):
        """Take over what `resume` has found. Raises ModelError or CheckpointError where it does not fit."""
        if self.found is None:
            return
        folder, state = self.found
        ema_shadow = self.model.load_trained(folder, ema=self.ema.shadow is not None)
        if ema_shadow is not None:
            self.ema.load(ema_shadow, state["ema_updates"])
        saved = _read_state(folder / "optimizer.pt", mmap=self.run.is_sharded or self.run.zero_stage > 0)
        try:
            load_optimizer(self.optimizer, saved["optimizer"])
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds the state of an optimizer of other weights ({error}): give the flags that its run "
                "had (--train_text_encoder, say), or start a new run"
            ) from error
        if self.run.scaler and saved["scaler"]:
            self.run.scaler.load_state_dict(saved["scaler"])
        self._set_aside_after(state["step"])
        self.last_saved = state["step"] if folder.parent == self.folder else None
        self.say(f"resumed from {folder}: {state['step']} steps are done")

    def _state(self, step):
        return {
            "step": step,
            "ema_updates": self.ema.updates,
            "ema_start": self.ema.start_kind,
            "dataset": self.dataset_id,
            "versions": {"torch": torch.__version__},
            "draws": DRAWS,
            "precision": self.run.accelerator.mixed_precision,
            "processes": self.run.accelerator.num_processes,
            "args": as_dict(self.args) | {"hub_token": None},
        }

    def _state_in(self, folder):
        """What a checkpoint says of its run. Raises CheckpointError or ModelError where no run has written that."""
        path = folder / "training_state.json"
        state, present = read_json(path), self._state(0)
        needed = ("step", "dataset", "versions", "precision", "processes", "args")
        if odd := [name for name in needed if not isinstance(state.get(name), type(present[name]))]:
            raise CheckpointError(f"{path} does not say the {', '.join(odd)} of its run: take another checkpoint")
        return state

    def _all(self):
        return checkpoints_in(self.folder)

    def _prune(self, newest):
        if self.args.checkpoints_total_limit is None:
            return
        older = [path for step, path in self._all() if step != newest]
        for path in older[: max(0, len(older) + 1 - self.args.checkpoints_total_limit)]:
            shutil.rmtree(path)

    def _set_aside_after(self, step):
        """Rename later checkpoints, broken or of a branch that is left here: latest must not find them again."""
        self.run.wait_for_everyone()  # nobody is still looking for the newest one
        for later, path in self._all():
            if later > step and self.run.is_main:
                renamed = path.with_name(f"abandoned-{path.name}-{int(time.time())}")
                path.rename(renamed)
                self.say(f"{path.name} comes after the one resumed from: set aside as {renamed.name}")

    def _latest(self):
        for _, path in reversed(self._all()):
            try:
                check_manifest(path)
                return path
            except BrokenFolder as problem:
                self.say(f"{problem}; looking for an older one")
        return None

    def _named(self, wanted):
        candidates = [Path(wanted), self.folder / wanted]
        folder = next((path for path in candidates if path.is_dir()), None)
        if folder is None:
            there = ", ".join(path.name for _, path in self._all()) or "none"
            raise CheckpointError(
                f"--resume_from_checkpoint {wanted}: there is no such folder; {self.folder} has {there}"
            )
        try:
            check_manifest(folder)
        except BrokenFolder as problem:
            raise CheckpointError(f"--resume_from_checkpoint: {problem}; name another, or take latest") from problem
        return folder

    def _refuse_older_checkpoints(self):
        found = self._all()
        if found:
            raise CheckpointError(
                f"--output_dir {self.folder} holds checkpoints of an earlier run (newest: {found[-1][1].name}): go on "
                "with --resume_from_checkpoint latest, or name another --output_dir"
            )

    def _compare_flags(self, state, folder):
        before, now = state["args"], as_dict(self.args)
        optimizer = lambda args: "adamw8bit" if args.get("use_8bit_adam") else args.get("optimizer")
        if optimizer(before) != optimizer(now):
            raise CheckpointError(
                f"{folder} holds the state of another optimizer (--optimizer {optimizer(before)}): ask for the same, "
                "or start a new run"
            )
        if before.get("use_ema") != now.get("use_ema") and now.get("use_ema"):
            raise CheckpointError(
                f"{folder} was trained without --use_ema, so there is no average to go on with: leave --use_ema out, "
                "or start a new run from the checkpoint's weights"
            )
        harmless = flags_without_effect(type(self.args))
        if now["lr_scheduler"].startswith("constant"):  # the other schedules depend on how long the run will be
            harmless |= {"max_train_steps", "num_train_epochs"}
        changed = [
            f"--{name} {before.get(name)} -> {value}"
            for name, value in now.items()
            if name not in harmless | {"optimizer", "use_8bit_adam"} and before.get(name, value) != value
        ]
        present = self._state(state["step"])
        changed += [f"{n} {state[n]} -> {present[n]}" for n in ("precision", "processes") if state[n] != present[n]]
        if state.get("draws", 1) != DRAWS and (not now["center_crop"] or now.get("lora_dropout")):
            changed.append("how random crops and dropout are drawn, in a newer version of this project")
        if state["dataset"] != self.dataset_id:
            changed.append("the dataset's rows, captions or buckets")
        if (version := state["versions"].get("torch")) != torch.__version__:
            changed.append(f"torch {version} -> {torch.__version__}")
        if changed:
            self.say(
                "since the checkpoint these have changed, so the result will differ from an uninterrupted run: "
                + "; ".join(changed)
            )


def _read_state(path, mmap):
    """What optimizer.pt holds; with `mmap` it stays on the disk until it is read, where each process takes a part."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:  # of a file that holds something else torch raises errors of many kinds
        raise CheckpointError(f"{path} holds no state of an optimizer: {error}") from error
