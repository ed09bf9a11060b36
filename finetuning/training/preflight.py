"""What is checked and said between loading the model and the first step."""

import copy
import itertools
import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import torch
from tqdm.auto import tqdm

from finetuning.cli import flag, size_text
from finetuning.data.cache import folder_of
from finetuning.data.findings import counted
from finetuning.families.model_args import ModelError
from finetuning.families.sharding import local
from finetuning.rng import queues
from finetuning.training.optim import update_problems

WEIGHT_BYTES = {"fp32": 4, "bf16": 2}  # of each trained weight
# Bytes of optimizer state of a parameter
STATE_BYTES = {
    "adamw": lambda p: 8 * p.numel(),
    "adamw8bit": lambda p: 2 * p.numel() if p.numel() >= 4096 else 8 * p.numel(),  # bitsandbytes' min_8bit_size
    "adafactor": lambda p: 4 * sum(p.numel() // side for side in p.shape[-2:]) if p.dim() > 1 else 4 * p.numel(),
    "prodigy": lambda p: 16 * p.numel(),
}


@dataclass
class PreflightArgs:
    """Preflight"""

    preflight: bool = flag(
        False, "only try whether the run fits, how fast it is and when it would be done, by two steps of its largest "
        "batch; fills the cache, trains and writes nothing", affects_result=False,
    )  # fmt: skip
    assume_memory: str | None = flag(
        None, "try it as on a GPU of this much memory, e.g. 16GB for a T4", requires="preflight", affects_result=False
    )

    def problems(self):
        if self.assume_memory and not re.fullmatch(r"\d+(\.\d+)? ?(GB)?", self.assume_memory, re.IGNORECASE):
            yield f"--assume_memory {self.assume_memory} must be a number of gigabytes, as 16GB"

    @property
    def assumed_bytes(self):
        """--assume_memory, or None."""
        return self.assume_memory and 1e9 * float(self.assume_memory.upper().removesuffix("GB"))

    def memory_advice(self):
        """What makes a step smaller and is not set yet, cheapest first, as lines of a message."""
        batch, lora = self.train_batch_size, hasattr(self, "rank")
        divisor = next(number for number in range(2, batch + 2) if batch % number == 0 or number > batch)
        fixed = bool(self.cached_crops) or self.center_crop
        cached = self.cache_latents == "on" or (self.cache_latents == "auto" and fixed)
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        fsdp, zero = (several and name in os.environ for name in ("FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"))
        divided = fsdp or zero  # they refuse some of the others
        smaller = f"--train_batch_size {batch // divisor} --gradient_accumulation_steps "
        smaller += f"{self.gradient_accumulation_steps * divisor}, with the same result"
        ways = {
            "--mixed_precision fp16, or bf16 on an A6000 or newer": (
                (self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) == "no"
            ),
            "--cache_latents" + " --center_crop" * (not fixed): not cached and not self.streaming,
            "--use_8bit_adam": self.optimizer == "adamw" and not self.use_8bit_adam and not divided,
            "--offload_ema": self.use_ema and not self.offload_ema and not fsdp,
            "a smaller --train_batch_size" if self.fused_backward_pass else smaller: batch > 1,
            "--gradient_checkpointing": not self.gradient_checkpointing,
            "accelerate_fsdp2.yaml, which shards the weights over the GPUs": several and not (lora or fsdp),
            "--optimizer adafactor --fused_backward_pass --max_grad_norm 0, without accumulation, fp16 or --compile": (
                not (lora or several) and not self.fused_backward_pass
            ),
            "--weights_precision bf16, with activations in bf16 too, on an A6000 or newer": (
                not (lora or divided) and self.weights_precision == "fp32"
            ),
            "--base_precision int8, or nf4": lora and self.base_precision not in ("int8", "nf4"),
            "train_lora.py in place of train_text_to_image.py": not lora,
            "a smaller --resolution": True,
        }  # fmt: skip
        return "\n".join(["What makes a step smaller, cheapest first:", *(f"  {way}" for way in ways if ways[way])])


def memory_of(args, model):
    """{what: bytes} that training keeps in memory besides activations and what encodes images and text."""
    trained = list(model.trained_parameters().values())
    optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer
    sizes = [WEIGHT_BYTES[args.weights_precision] * parameter.numel() for parameter in trained]
    frozen = sum(parameter.nbytes for parameter in model.denoiser.parameters()) - sum(one.nbytes for one in trained)
    return {
        "weights": frozen + sum(sizes),
        "gradients": max(sizes) if args.fused_backward_pass else sum(sizes),
        "optimizer": sum(map(STATE_BYTES[optimizer], trained)),
        "average": 4 * args.use_ema * sum(parameter.numel() for parameter in trained),
    }


def check_before_start(args, run, model, data, encoder):
    """Print what is about to happen; raises ModelError listing everything that cannot work."""
    sampler, total_steps, problems = data.batch_sampler, data.total_steps, []
    factor = model.codec.factor
    for side in sorted(set(args.size)):
        if side % factor:
            near = max(factor, round(side / factor) * factor)
            problems.append(
                f"--resolution {side} does not fit the autoencoder: take a multiple of {factor}, e.g. {near}"
            )
    if args.aspect_buckets and args.bucket_step % factor:
        near = -(-args.bucket_step // factor) * factor
        problems.append(
            f"--bucket_step {args.bucket_step} does not fit the autoencoder: take a multiple of {factor}, e.g. {near}"
        )
    if model.schedule.alpha_bar[-1] == 0 and model.schedule.prediction_type == "epsilon":
        whose = "--rescale_betas_zero_snr" if args.rescale_betas_zero_snr else "the schedule of this base"
        problems.append(f"{whose} leaves no signal at the last timestep, where epsilon is the input itself and teaches "
                        "nothing: add --prediction_type v_prediction or sample")  # fmt: skip
    if args.dream_training and model.scheduler.config.prediction_type != "epsilon":
        problems.append(
            f"--dream_training works with epsilon, and this model predicts {model.scheduler.config.prediction_type}: "
            "leave the flag out"
        )
    if args.dream_training and model.learns_variance:
        problems.append("--dream_training knows nothing of a variance, which this model learns: leave the flag out")
    if args.vlb_weight and not model.learns_variance:
        problems.append(f"--vlb_weight {args.vlb_weight} does nothing: this model does not learn its variance")
    problems += [*_upscaler_problems(args, model), *update_problems(args, run)]
    memory = memory_of(args, model)
    count = sum(parameter.numel() for parameter in model.trained_parameters().values())
    trained = count * WEIGHT_BYTES[args.weights_precision]
    needed = trained + memory["optimizer"] + memory["average"]
    exported = trained + memory["average"] + model.copied_bytes()
    limit = args.checkpoints_total_limit
    # A new checkpoint stands before an old one goes. Without a limit, two are the least that a run comes to.
    room = needed * ((limit or 1) + 1) + exported
    free = shutil.disk_usage(_existing(run.output_dir)).free
    if room > free:
        problems.append(
            f"{(limit or 1) + 1} checkpoints of {size_text(needed)} and the finished result need about "
            f"{size_text(room)}, and the disk of --output_dir {args.output_dir} has {size_text(free)} left: free "
            "some, name another folder, or lower --checkpoints_total_limit"
        )
    if run.is_sharded:
        memory = {what: size // run.processes for what, size in memory.items()}
    elif run.zero_stage:  # a process keeps its part of the weights twice, and adds up its part of the gradients apart
        memory["optimizer"] = (memory["optimizer"] + trained) // run.processes
        summed = memory["gradients"] // run.processes
        memory["gradients"] = summed + (summed if run.zero_stage == 2 else memory["gradients"])
    at_least = sum(memory.values()) - memory["average"] * args.offload_ema
    if args.assumed_bytes and at_least > args.assumed_bytes:
        problems.append(
            f"--assume_memory {args.assume_memory}: {_listed(memory)} take {size_text(at_least)} already.\n"
            f"{args.memory_advice()}"
        )
    if not problems:
        problems += _make_room_for_cache(args, run, encoder, room)
    if problems:
        raise ModelError("\n".join(problems))

    epochs = f", {total_steps / sampler.steps_per_epoch:.1f} epochs" if sampler.steps_per_epoch else ""
    run.say(
        f"{model.summary()}\n"
        f"dataset: {data.summary()}\n"
        f"schedule: {counted(total_steps, 'step')} of {counted(sampler.total_batch_size, 'row')} "
        f"({args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {sampler.processes} "
        f"process{'es' if sampler.processes > 1 else ''}){epochs}\n"
        f"device: {run.device}, activations {run.accelerator.mixed_precision.replace('no', 'fp32')}; in memory besides "
        f"these: {_listed(memory)}\n"
        f"disk: a checkpoint takes about {size_text(needed)}, {(limit or 1) + 1} of them and the result "
        f"{size_text(room)}; {size_text(free)} are free"
    )
    _advise_on_precision(args, run)
    if args.aspect_buckets:
        run.say(
            f"buckets: {len(sampler.rows_in_bucket)}, and every step is of one: {sampler.short_steps} of the "
            f"{sampler.steps_per_epoch} steps of an epoch have fewer than {sampler.total_batch_size} rows"
        )
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        run.say(
            f"--lr_warmup_steps {args.lr_warmup_steps} is not shorter than the run of {counted(total_steps, 'step')}: "
            "the learning rate never reaches --learning_rate"
        )
    kept = total_steps // args.checkpointing_steps if args.checkpointing_steps and limit is None else 0
    if kept * needed + exported > free:
        run.say(
            f"{kept} checkpoints would fill the disk ({size_text(kept * needed)} of {size_text(free)} free): "
            "--checkpoints_total_limit 3 keeps the newest three"
        )


def _listed(memory):
    return ", ".join(f"{what} {size_text(size)}" for what, size in memory.items() if size)


def _advise_on_precision(args, run):
    """Say what the card could do and was not asked for, or cannot do and was."""
    if run.device.type == "cpu" or not torch.cuda.is_available():
        return
    name = torch.cuda.get_device_name(run.device)
    if torch.cuda.get_device_capability(run.device) < (8, 0):
        if run.weights_dtype == torch.bfloat16:
            run.say(f"{name} has no bf16 and imitates it, slowly: --mixed_precision fp16 is what it is fast in")
        return
    unused = {
        "--mixed_precision bf16 (as fast as fp16, nothing overflows)": run.weights_dtype != torch.bfloat16,
        "--allow_tf32 (faster where fp32 is left)": not args.allow_tf32,
    }
    if any(unused.values()):
        run.say(f"{name} also has {' and '.join(way for way, is_unused in unused.items() if is_unused)}")


def _upscaler_problems(args, model):
    """What cannot be generated while an upscaler is trained, and flags that only go with one, as text."""
    prompts, images = len(args.prompts), len(args.validation_image or [])
    if not model.family.needs_image:
        if args.patch_size or images:
            yield f"--patch_size and --validation_image are for upscalers, and this is a {model.family.pipeline}"
    elif images != prompts:
        yield (
            f"an upscaler enlarges images: give --validation_image for each of the {prompts} validation prompts, or "
            "leave the prompts out"
        )
    if model.family.needs_image and args.evaluate_every and args.evaluate_with != "loss":
        yield f"--evaluate_with {args.evaluate_with} generates from prompts alone, which an upscaler cannot: take loss"


def _make_room_for_cache(args, run, encoder, room):
    """Yield why the cache does not fit on its disk beside `room` bytes of checkpoints, where those lie there too. One
    that was not asked for is turned off instead."""
    folder, needed = folder_of(args), encoder.bytes_needed
    disk, output = _existing(folder), _existing(run.output_dir)
    room = room if disk.stat().st_dev == output.stat().st_dev else 0
    left = shutil.disk_usage(disk).free - room if os.access(disk, os.W_OK) else 0
    if not needed or not run.any(needed > left):
        return
    problem = f"{size_text(needed)} are needed in {folder}, and {size_text(max(0, left))} can be had there"
    if args.cache_latents == "on":
        yield f"--cache_latents: {problem}: free some, name another --cache_folder, or leave the flag out"
    else:
        run.say(f"cache: off, {problem} (--cache_folder names another place)")
        encoder.turn_off()


# -- the rehearsal -----------------------------------------------------------------------------------------------------


def largest_step(sampler, images):
    """The number of a step whose micro-batches have the most pixels of all, and of those one with the most rows; of a
    stream, where all are alike, 0."""
    if sampler.rows is None:
        return 0
    most = sampler.micro_batch * sampler.processes
    sizes = [(math.prod(images.sizes[rows[0]]) * min(len(rows), most), len(rows)) for rows in sampler.groups(epoch=0)]
    return sizes.index(max(sizes))


def undoing(parameters, ema, owners):
    """A call that puts weights {name: parameter}, their average and all that has a state_dict back as they are now."""
    weights = {name: local(weight).detach().to("cpu", copy=True) for name, weight in parameters.items()}

    def as_it_is(name, average):
        """Kept apart from its weight only where it is another: the CPU's memory may be small too."""
        now, weight = local(average).to("cpu", copy=True), weights[name]
        return weight if now.dtype == weight.dtype and now.equal(weight) else now

    averages = ema.shadow or {}
    tensors = [*parameters.values(), *averages.values()]
    kept = [*weights.values(), *(as_it_is(*item) for item in averages.items())]
    states, updates = [copy.deepcopy(owner.state_dict()) for owner in owners], ema.updates

    @torch.no_grad()
    def undo():
        for tensor, before in zip(tensors, kept, strict=True):
            local(tensor).copy_(before)
        for owner, state in zip(owners, states, strict=True):
            owner.load_state_dict(state)
        ema.updates = updates

    return undo


def prepare_memory(args, device):
    """Give back what loading and caching no longer need, so that the peak from here on is the steps' own, and let
    PyTorch have no more of the GPU than --assume_memory leaves beside what else lies there, the CUDA context above all.
    More than that is an OutOfMemoryError, as it would be on that GPU."""
    if not queues(device):
        return
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    if args.assumed_bytes:
        free, total = torch.accelerator.get_memory_info(device)
        others = total - free - torch.accelerator.memory_reserved(device)
        # Of the current GPU: of one process alone `device` has no number, which this function refuses
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, args.assumed_bytes - others) / total))


def clock(device):
    """Seconds, once the device has done all that is queued."""
    if queues(device):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def forecast(device, rows, seconds, steps):
    """What a step of so many rows, that took so long, says of a run of so many steps, in words."""
    took = f"a step of {counted(rows, 'row')} takes {seconds:.2f} s"
    if queues(device):
        peak, whole = torch.accelerator.max_memory_reserved(device), torch.accelerator.get_memory_info(device)[1]
        took += f" and {size_text(peak)} of the GPU's {size_text(whole)} at its peak: it fits"
    done = datetime.now() + timedelta(seconds=seconds * steps)
    return (
        f"rehearsal: {took}; {rows / seconds:.3g} images a second. {steps} steps take "
        f"{tqdm.format_interval(seconds * steps)}, until {done:%Y-%m-%d %H:%M}; validation, checkpoints and waits "
        "for images are not counted"
    )


# -- kernels -----------------------------------------------------------------------------------------------------------


def set_up_kernels(args, run, model):
    """Switch xformers on where it was asked for, works and is faster than PyTorch's attention, and say which is used.
    Also channels_last and torch.compile. Raises ModelError where xformers does not work."""
    denoiser = model.denoiser.denoiser
    if args.enable_xformers_memory_efficient_attention:
        if run.device.type == "cpu":
            run.say("--enable_xformers_memory_efficient_attention: xformers needs a GPU, PyTorch's attention is used")
        else:
            _probe_xformers(run, denoiser)
            if run.any(_xformers_is_faster(args, run, model)):
                denoiser.enable_xformers_memory_efficient_attention()
    if args.channels_last and run.device.type != "cpu":
        denoiser.to(memory_format=torch.channels_last)
    if args.compile:
        denoiser.compile()


def _probe_xformers(run, denoiser):
    """Attention at the denoiser's own head sizes, forward and backward, beside PyTorch's; over pixels and 77 tokens.

    Each size has a kernel of its own, and users report backward passes that fail or give NaN for some of them only.
    Raises ModelError where one fails or disagrees.
    """
    advice = "leave --enable_xformers_memory_efficient_attention out: PyTorch's own attention is used then"
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ModelError(f"xformers cannot be imported ({error}); {advice}") from error
    from diffusers.models.attention_processor import Attention

    sizes = sorted({m.inner_dim // m.heads for m in denoiser.modules() if isinstance(m, Attention)})
    for head_size, keys in itertools.product(sizes, (64, 77)):
        case = f"xformers' attention with heads of {head_size} and {keys} keys"
        try:
            worst = _disagreement(memory_efficient_attention, head_size, keys, run.device, run.weights_dtype)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ModelError(f"{case} fails on this GPU ({error}); {advice}") from error
        if not worst < 0.02:
            raise ModelError(f"{case} differs from PyTorch's by {worst:.1%} on this GPU; {advice}")


def _xformers_is_faster(args, run, model):
    """Whether its attention takes less time than PyTorch's where the run's images have the most tokens."""
    from torch.utils.benchmark import Timer  # waits for a GPU
    from xformers.ops import memory_efficient_attention

    shape = _largest_attention(args, model)
    tensors = [torch.randn(shape, device=run.device, dtype=run.weights_dtype) for _ in range(3)]
    xformers, pytorch = (
        Timer("run()", globals={"run": partial(_forward_and_backward, function, tensors)}).timeit(20).mean * 1000
        for function in (memory_efficient_attention, _pytorch_attention)
    )
    run.say(
        f"attention: xformers takes {xformers:.3g} ms and PyTorch {pytorch:.3g}, forward and backward, for a batch of "
        f"{shape[0]} with {shape[1]} tokens in {shape[2]} heads of {shape[3]}: the faster one is used"
    )
    return xformers < pytorch


def _largest_attention(args, model):
    """(batch, tokens, heads, width of a head) of the denoiser's attention that has the most tokens in this run."""
    from diffusers.models.attention_processor import Attention

    sides, found = [min(side, args.patch_size or side) // model.codec.factor for side in args.size], []
    for name, module in model.denoiser.denoiser.named_modules():
        if isinstance(module, Attention):
            block = re.match(r"down_blocks\.(\d+)", name)  # each halves the sides; the others repeat these, or less
            tokens = math.prod(side >> int(block[1]) for side in sides) if block else 1
            found.append((tokens, module.heads, module.inner_dim // module.heads))
    return args.train_batch_size, *max(found)


def _forward_and_backward(attention, tensors):
    """The output [batch, tokens, heads, width] and the three gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _pytorch_attention(query, key, value):
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _disagreement(attention, head_size, keys, device, dtype):
    """The largest relative difference from PyTorch's attention, of the output and of the three gradients."""
    generator = torch.Generator().manual_seed(0)
    lengths = (64, keys, keys)
    tensors = [torch.randn(2, n, 4, head_size, generator=generator).to(device, dtype) for n in lengths]
    results = (_forward_and_backward(function, tensors) for function in (attention, _pytorch_attention))
    pairs = zip(*results, strict=True)
    # torch's max keeps a nan, Python's drops it unless it comes first
    return torch.stack([(a - b).float().norm() / b.float().norm() for a, b in pairs]).max().item()


def _existing(folder):
    """The folder, or the one above it that exists."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)
