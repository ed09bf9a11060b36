"""What is checked and said between loading the model and the first step."""

import itertools
import os
import shutil

import torch

from finetuning.cli import size_text
from finetuning.data.cache import folder_of
from finetuning.families.model_args import ModelError
from finetuning.training.optim import update_problems

# Bytes of each trained parameter itself, and of its optimizer's state.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 2, "prodigy": 16}


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
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer
    weights = trained * (WEIGHT_BYTES[args.weights_precision] + 4 * args.use_ema)
    needed = weights + trained * STATE_BYTES[optimizer]
    exported = weights + model.copied_bytes()
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
    if not problems:
        problems += _make_room_for_cache(args, run, encoder, room)
    if problems:
        raise ModelError("\n".join(problems))

    epochs = f", {total_steps / sampler.steps_per_epoch:.1f} epochs" if sampler.steps_per_epoch else ""
    run.say(
        f"{model.summary()}\n"
        f"dataset: {data.summary()}\n"
        f"schedule: {total_steps} steps of {sampler.total_batch_size} rows ({args.train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulated x {sampler.processes} processes){epochs}\n"
        f"device: {run.device}, activations {run.accelerator.mixed_precision.replace('no', 'fp32')}; "
        f"a checkpoint takes about {size_text(needed)}"
    )
    if args.aspect_buckets:
        run.say(
            f"buckets: {len(sampler.rows_in_bucket)}, and every step is of one: {sampler.short_steps} of the "
            f"{sampler.steps_per_epoch} steps of an epoch have fewer than {sampler.total_batch_size} rows"
        )
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        run.say(
            f"--lr_warmup_steps {args.lr_warmup_steps} is not shorter than the run of {total_steps} steps: the "
            "learning rate never reaches --learning_rate"
        )
    kept = total_steps // args.checkpointing_steps if args.checkpointing_steps and limit is None else 0
    if kept * needed + exported > free:
        run.say(
            f"{kept} checkpoints would fill the disk ({size_text(kept * needed)} of {size_text(free)} free): "
            "--checkpoints_total_limit 3 keeps the newest three"
        )


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


def set_up_kernels(args, run, model):
    """Switch xformers on where it was asked for and works; say so where it cannot. Also torch.compile."""
    denoiser = model.denoiser.denoiser
    if args.enable_xformers_memory_efficient_attention:
        if run.device.type == "cpu":
            run.say("--enable_xformers_memory_efficient_attention: xformers needs a GPU, PyTorch's attention is used")
        else:
            _probe_xformers(run, denoiser)
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


def _disagreement(attention, head_size, keys, device, dtype):
    """The largest relative difference from PyTorch's attention, of the output and of the three gradients."""
    generator = torch.Generator().manual_seed(0)
    lengths = (64, keys, keys)
    tensors = [torch.randn(2, n, 4, head_size, generator=generator).to(device, dtype) for n in lengths]

    def result(function):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]

    def pytorch(query, key, value):
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    pairs = zip(result(attention), result(pytorch), strict=True)
    # torch's max keeps a nan, Python's drops it unless it comes first
    return torch.stack([(a - b).float().norm() / b.float().norm() for a, b in pairs]).max().item()


def _existing(folder):
    """The folder, or the one above it that exists."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)
