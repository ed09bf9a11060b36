"""One training run: devices, precision, seed, logs, signals, and the end."""

import importlib.util
import json
import os
import random
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from finetuning.cli import SEEDS, UserError, as_dict, flag, paths_read
from finetuning.families.sharding import full, shard
from finetuning.files import output_problems, write_json, write_text, writing
from finetuning.rng import queues
from finetuning.training.checkpoint import seed_of_resumed_run
from finetuning.training.zero import ZeroAdamW

TRACKERS = ("tensorboard", "wandb", "all", "none")

PRECISIONS = ("no", "fp16", "bf16")
TAKEN = {  # what a launcher may ask for besides the flags: {variable: what of it is done here}
    "ACCELERATE_MIXED_PRECISION": PRECISIONS,
    "ACCELERATE_USE_MEGATRON_LM": ("false",),
    "FSDP_VERSION": ("2",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("1", "2"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none",),
}
# What accelerate would read besides, and what would change the result without a word
ENVIRONMENT_OF_OTHERS = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")


@dataclass
class RunArgs:
    """Run"""

    output_dir: str = flag(
        "sd-model-finetuned", "where everything goes: the result, checkpoints, logs, args.json", affects_result=False
    )
    num_train_epochs: int = flag(100, "passes over the dataset; --max_train_steps wins over it", min=1)
    max_train_steps: int | None = flag(None, "optimizer steps in all, exactly, those before a resume included", min=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", min=1)
    seed: int | None = flag(
        None, "seed of everything random; none: chosen once, written to args.json and kept on resume", **SEEDS
    )
    mixed_precision: str | None = flag(
        None, "precision of activations; none: what `accelerate launch` or accelerate_config.yaml says",
        choices=PRECISIONS,
    )  # fmt: skip
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and later: faster, a little less exact")
    report_to: str = flag("tensorboard", "where logs go besides metrics.jsonl", choices=TRACKERS, affects_result=False)
    logging_dir: str = flag("logs", "folder of the TensorBoard logs, inside --output_dir", affects_result=False)
    tracker_project_name: str = flag(
        "text2image-fine-tune", "name of the project for the trackers", affects_result=False
    )
    push_to_hub: bool = flag(False, "upload the finished result, without checkpoints, to the Hub", affects_result=False)
    hub_token: str | None = flag(None, "token for the Hub; better logged in with `hf auth login`", affects_result=False)
    hub_model_id: str | None = flag(
        None, "repository on the Hub (none: the output folder's name)", requires="push_to_hub", affects_result=False
    )
    local_rank: int = flag(
        -1, "accepted for older launchers; accelerate reads the environment itself", affects_result=False
    )

    def problems(self):
        if self.report_to in ("wandb", "tensorboard") and importlib.util.find_spec(self.report_to) is None:
            yield f"--report_to {self.report_to}: it is not installed: pip install {self.report_to}"
        if Path(self.output_dir).is_file():
            yield f"--output_dir {self.output_dir} is a file"
        yield from output_problems(self.output_dir, paths_read(self), around=True)
        logs = Path(self.output_dir, self.logging_dir).resolve()
        if not logs.is_relative_to(Path(self.output_dir).resolve()):
            yield from output_problems(logs, paths_read(self), flag="--logging_dir")


class Run:
    """What belongs to the process rather than to the model: accelerate, logs, signals."""

    def __init__(self, args: RunArgs):
        from accelerate import Accelerator, PartialState
        from accelerate.utils import ProjectConfiguration, parse_flag_from_env

        self.args = args
        # A shell starts what it puts in the background with Ctrl-C ignored: until `begin`, it ends the process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        fsdp, zero = (parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
        asked = {"FSDP_VERSION": "1" if fsdp else None, **os.environ, "ACCELERATE_MIXED_PRECISION": wanted}
        unknown = [f"{k}={asked[k]}" for k in TAKEN if asked.get(k) and asked[k].lower() not in TAKEN[k]]
        if unknown:
            raise UserError(
                f"accelerate asks for what is not done here: {', '.join(unknown)}. Set it up without, by `accelerate "
                "config`, or launch with accelerate_config.yaml, accelerate_fsdp2.yaml (FSDP, and what ZeRO-3 is for) "
                "or accelerate_zero2.yaml (DeepSpeed)"
            )
        if zero and importlib.util.find_spec("deepspeed") is None:
            raise UserError("accelerate asks for DeepSpeed, and it is not installed: pip install -r requirements.txt")
        # accelerate itself would take both in `prepare`: FSDP when average and optimizer hold whole weights, and not
        # on a CPU; DeepSpeed with weights in bf16, and with checkpoints of its own
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        # Asked here first, accelerate would keep the answer: it has to hear of --cpu and use_cpu now.
        # The others wait while the main process writes a checkpoint, of dozens of gigabytes perhaps
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=2))
        _check_processes(state)
        for name in ENVIRONMENT_OF_OTHERS:
            os.environ.pop(name, None)
        precision = "no" if wanted == "fp16" and state.device.type == "cpu" else wanted
        self.output_dir = Path(args.output_dir)
        trackers = [] if args.report_to == "none" else args.report_to
        self.accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / args.logging_dir)
            ),
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        self.is_sharded = fsdp and self.processes > 1
        zero = zero and self.processes > 1
        self.zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)) if zero else 0
        self.shards, self.zero = [], None
        self.autocast = self.accelerator.autocast
        self.bar = None
        self.stop_signal = None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizing happens in forked loader processes
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        if precision != wanted:
            self.say("no GPU here: fp16 needs one, so this run is in fp32")
        if args.seed is None:
            args.seed = seed_of_resumed_run(args)
        if args.seed is None:
            args.seed = self._new_seed()

    @property
    def weights_dtype(self):
        """Precision of what is not trained."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def scaler(self):
        """The fp16 loss scaler, or None."""
        return self.accelerator.scaler

    def say(self, message):
        """One line (or paragraph) for the person at the terminal, from the main process only."""
        if self.is_main:
            tqdm.write(str(message), file=sys.stderr)

    def begin(self, first_step, total_steps):
        """Write args.json, open the logs, catch SIGTERM and Ctrl-C, show the bar."""
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / "args.json", self._facts())
            self._forget_metrics_after(first_step)
        if self.args.report_to != "none":
            plain = {k: v for k, v in as_dict(self.args).items() if isinstance(v, int | float | str)}
            try:
                self.accelerator.init_trackers(self.args.tracker_project_name, {**plain, "hub_token": ""})
            except OSError:  # of the disk
                raise
            except Exception as error:  # each service has its own: no key, no network, no right to the project
                raise UserError(
                    f"--report_to {self.args.report_to} cannot start: {error}. Log in to the service (`wandb login`), "
                    "or choose another; metrics.jsonl is written anyway"
                ) from error
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc="training",
            unit="step",
            disable=not self.is_main,
            smoothing=0.05,
        )

    def shard(self, model):
        """Divide the trained weights among the processes, where accelerate_fsdp2.yaml asks for it."""
        if self.is_sharded:
            from torch.distributed.device_mesh import DeviceMesh

            mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, self.device.type)
            reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
            for module in model.trained_modules.values():
                self.shards += shard(module, mesh, reshards)

    @contextmanager
    def forward_passes(self):
        """Around forward passes. Weights of a sharded model may stay gathered for a backward pass that never comes,
        and would not hear of a change to their shards."""
        yield
        for module in self.shards:
            module.reshard()

    def divide(self, optimizer, model):
        """The optimizer with its state divided among the processes, where accelerate_zero2.yaml asks for it."""
        if self.zero_stage:
            self.zero = ZeroAdamW(model.denoiser, optimizer, self.zero_stage, self.args.max_grad_norm)
        return self.zero or optimizer

    def prepare(self, model, optimizer):
        """Both for this run's devices and precision; the optimizer's state already lies where it belongs."""
        from accelerate.utils import DistributedDataParallelKwargs

        skips = (model.family.skips_weights and model.text_encoders) or getattr(self.args, "unet_config", None)
        if skips:  # or processes wait for gradients that never come
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        # Divided weights are where they belong, and DistributedDataParallel, which copies weights, does not go around
        divided = self.is_sharded or bool(self.zero)
        model = self.accelerator.prepare_model(model, device_placement=not divided, evaluation_mode=divided)
        if self.zero:
            return self.zero.engine, self.zero  # which calls that model
        return model, self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def accumulate(self, model, batch):
        """Gradients are exchanged between processes at the last micro-batch of a step only; divided ones at each, or
        every process would hold all of them until then."""
        if self.is_sharded:
            return self.forward_passes()
        return nullcontext() if batch.ends_step or self.zero else self.accelerator.no_sync(model)

    def backward(self, row_losses, weights):
        """Add the gradient of the weighted loss; returns its value on this process, a detached scalar."""
        loss = (row_losses * weights).sum()
        # Processes' gradients are averaged, and the weights of a step sum to 1 over all of them.
        (self.zero or self.accelerator).backward(loss * self.accelerator.num_processes)
        return loss.detach()

    def clip(self, parameters):
        """Clip the whole gradient at --max_grad_norm; returns its norm before."""
        if self.zero:
            return self.zero.take_gradient_norm()
        return full(self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or float("inf")))

    def total(self, value):
        """Sum of a scalar tensor over the processes."""
        return self.accelerator.reduce(value, reduction="sum")

    @property
    def lag(self):
        """How many steps are queued before one is looked at: a GPU is not waited for within a step."""
        return 1 if queues(self.device) else 0

    def floats(self, *scalars):
        """A call that gives the values of these tensors; on a GPU it waits for what was queued up to here."""
        on_gpu = queues(self.device)
        values = torch.stack(scalars).to("cpu", non_blocking=on_gpu)  # into pinned memory
        arrived = torch.accelerator.current_stream().record_event() if on_gpu else None

        def read():
            if arrived:
                arrived.synchronize()
            return values.tolist()

        return read

    def wait_for_everyone(self):
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def any(self, flag):
        """Whether the flag is set on any process: all have to stop, save or go on together."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        return self.total(torch.tensor(float(bool(flag)), device=self.device)).item() > 0

    def gathered(self, items):
        """The lists of all processes, one after another."""
        from accelerate.utils import gather_object

        return gather_object(items)

    def shared(self, items, compute):
        """compute(items), a list of a result for each item; the processes share the items out, and all get all.

        A sharded model computes on all of them together.
        """
        if self.is_sharded:
            return self.gathered([compute(items)])[0]  # they must not come to different decisions by a last bit
        parts = self.gathered([compute(items[self.process :: self.processes])])
        results = [None] * len(items)
        for process, part in enumerate(parts):
            results[process :: self.processes] = part
        return results

    def log(self, values, step):
        """Numbers of one step, to metrics.jsonl and the trackers."""
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self.is_main:
            path = self.output_dir / "metrics.jsonl"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")

    def log_images(self, name, images, step):
        """PIL images of one size, to the trackers that show them."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for number, image in enumerate(images):
                    tracker.writer.add_image(f"{name}/{number}", pil_to_tensor(image), step)
            elif tracker.name == "wandb":
                import wandb

                tracker.log({name: [wandb.Image(image) for image in images]}, step=step)

    def tick(self, **shown):
        """One step further on the bar."""
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.bar.update(1)

    def finish(self):
        """Close the bar, the trackers and the processes' group."""
        if self.bar is not None:
            self.bar.close()
        self.accelerator.end_training()

    def _on_signal(self, number, _frame):
        if self.stop_signal == number == signal.SIGINT:  # Ctrl-C twice: stop at once; the checkpoints on disk are whole
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A repeated SIGTERM is only the launcher passing on what everybody got: it must not cut the save short.
        self.stop_signal = number
        # Not through the bar: a handler may stand inside one of its writes.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint\n".encode())

    def _facts(self):
        packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft")
        return {
            **(as_dict(self.args) | {"hub_token": None}),
            "run": {  # cli passes over this key, so that args.json can be given to --config
                "command": [word.replace(self.args.hub_token or "\0", "HIDDEN") for word in sys.argv],
                "precision": self.accelerator.mixed_precision,
                "processes": self.accelerator.num_processes,
                "device": str(self.device),
                "versions": {name: version(name) for name in packages},
            },
        }

    def _new_seed(self):
        """A drawn seed, the same on all processes."""
        drawn = torch.tensor(random.SystemRandom().randrange(2**31), device=self.device)
        return int(self.accelerator.reduce(drawn, reduction="sum").item() % 2**31)

    def _forget_metrics_after(self, step):
        """A run that resumes writes what came after its checkpoint again: later steps, and its step's validation."""
        path = self.output_dir / "metrics.jsonl"
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
                kept = [
                    text for text, one in whole if one["step"] < step or (one["step"] == step and "train_loss" in one)
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not what a run writes ({error}): move it away, then resume") from error
            write_text(path, "".join(kept))


def _check_processes(state):
    """Raises UserError where a launcher started several processes that know nothing of each other."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started, and each would train alone: accelerate sees {state.num_processes}. "
            "Without a GPU, start them with `accelerate launch --cpu --num_processes N`"
        )
