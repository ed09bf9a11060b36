"""What is checked and said between loading the model and the first step."""

import shutil

import torch

from finetuning.families.contract import ModelProblem

# Bytes of optimizer state for each trained parameter, which has four itself.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 2, "prodigy": 16}


def check_before_start(args, run, model, training, held_out, order, total_steps):
    """Print what is about to happen; raises ModelProblem listing everything that cannot work."""
    problems = []
    factor = model.pixels_per_latent
    for side in sorted(set(args.size)):
        if side % factor:
            near = max(factor, round(side / factor) * factor)
            problems.append(
                f"--resolution {side} does not fit the autoencoder: take a multiple of {factor}, e.g. {near}"
            )
    if args.dream_training and model.scheduler.config.prediction_type != "epsilon":
        problems.append(
            f"--dream_training works with epsilon, and this model predicts {model.scheduler.config.prediction_type}: "
            "leave the flag out"
        )
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer
    needed = trained * (4 + STATE_BYTES[optimizer] + 4 * args.use_ema)
    free = _free_bytes(run.output_dir)
    if needed > free:
        problems.append(
            f"a checkpoint needs about {needed / 1e9:.1f} GB and the disk of --output_dir {args.output_dir} has "
            f"{free / 1e9:.1f} GB left: free some, or name another folder"
        )
    if problems:
        raise ModelProblem("\n".join(problems))

    parts = " + ".join(f"{name} {_millions(module)}" for name, module in model.trained_modules.items())
    frozen = "" if model.trains_text_encoder else f"; text encoder {_millions(model.denoiser.text_encoder)} frozen"
    run.say(
        f"trained: {parts}{frozen}; autoencoder {_millions(model.vae)} frozen\n"
        f"dataset: {len(training)} rows" + (f", {len(held_out)} held out" if held_out else "") + "\n"
        f"schedule: {total_steps} steps of {order.group_size} rows ({args.train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulated x {order.processes} processes), "
        f"{total_steps / order.steps_per_epoch:.1f} epochs\n"
        f"device: {run.device}, activations {run.accelerator.mixed_precision.replace('no', 'fp32')}; "
        f"a checkpoint takes about {needed / 1e6:.0f} MB"
    )


def choose_attention(args, run, model):
    """Switch xformers on where it was asked for and works; say so where it cannot. Also torch.compile."""
    if args.enable_xformers_memory_efficient_attention:
        if run.device.type == "cpu":
            run.say("--enable_xformers_memory_efficient_attention: xformers needs a GPU, PyTorch's attention is used")
        else:
            _probe_xformers(run)
            model.denoiser.unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        model.denoiser.unet.compile()


def _probe_xformers(run):
    """One attention, forward and backward, beside PyTorch's. Raises ModelProblem where it fails or disagrees."""
    advice = "leave --enable_xformers_memory_efficient_attention out: PyTorch's own attention is used then"
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ModelProblem(f"xformers cannot be imported ({error}); {advice}") from error
    dtype = run.weights_dtype
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 64, 4, 40, generator=generator).to(run.device, dtype) for _ in range(3))

    def result(attention):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attention(*inputs)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]

    def pytorch(q, k, v):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    try:
        pairs = zip(result(memory_efficient_attention), result(pytorch), strict=True)
        # torch's max keeps a nan, Python's drops it unless it comes first
        worst = torch.stack([(a - b).float().norm() / b.float().norm() for a, b in pairs]).max().item()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ModelProblem(f"xformers' attention fails on this GPU ({error}); {advice}") from error
    if not worst < 0.02:
        raise ModelProblem(f"xformers' attention differs from PyTorch's by {worst:.1%} on this GPU; {advice}")


def _free_bytes(folder):
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _millions(module):
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
