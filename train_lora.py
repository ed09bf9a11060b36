"""Fine-tune low-rank adapters (LoRA) on a frozen Stable Diffusion, on your own captioned images.

    accelerate launch --config_file accelerate_config.yaml train_lora.py \\
        --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk \\
        --resolution 64 --rank 16 --learning_rate 2e-3 --max_train_steps 300 --output_dir runs/chalk-lora

Reads   a diffusers pipeline (a folder or a Hub name) and an image folder with metadata.jsonl (or a Hub dataset, or
        with --streaming shards of one).
Writes  into --output_dir: pytorch_lora_weights.safetensors, which load_lora_weights loads (averaged weights with
        --use_ema, the raw ones beside them); kohya_lora_weights.safetensors with --save_kohya, for A1111 and ComfyUI;
        checkpoint-N/; validation/ and comparison.png; logs/ for TensorBoard; metrics.jsonl; args.json. Every LoRA file
        is loaded back into a fresh pipeline and compared before the run says that it is done.
Go on   after a crash, Ctrl-C or a pulled plug: the same command with --resume_from_checkpoint latest. The result is
        that of a run which was never interrupted.
"""

import sys
from dataclasses import dataclass
from functools import partial

from finetuning.cli import flag, run_script
from finetuning.data.buckets import BucketArgs
from finetuning.data.cache import CacheArgs, build_encoder
from finetuning.data.captions import CaptionArgs
from finetuning.data.loading import load_training
from finetuning.data.streams import StreamArgs
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs, diffusion_loss, draw_noise
from finetuning.families.lora_files import DIFFUSERS_NAME
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, UpscalingArgs
from finetuning.training.adapters import add_adapters
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.ema import EMAArgs, build_ema
from finetuning.training.evaluator import RetentionArgs, ValidationArgs
from finetuning.training.lora_layout import LoraArgs
from finetuning.training.optim import OptimArgs, build_optimizer
from finetuning.training.preflight import PreflightArgs, check_before_start, set_up_kernels
from finetuning.training.run import Run, RunArgs
from finetuning.training.session import Session


@dataclass
class Args(
    RunArgs, PreflightArgs, RetentionArgs, ValidationArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, CacheArgs,
    BucketArgs, CaptionArgs, StreamArgs, DataArgs, UpscalingArgs, LoraArgs, ModelArgs,
):  # fmt: skip
    """Every flag, group by group; here those whose defaults differ, as in diffusers' LoRA script."""

    output_dir: str = flag("sd-model-finetuned-lora")
    num_validation_images: int = flag(4)
    validation_epochs: int = flag(1)


def main(argv=None):
    """Train, and return the exit status."""
    return run_script(Args, __doc__, train, argv)


def train(args):
    """One run from the first step, or from a checkpoint, to the last."""
    # What we train, and on what
    run = Run(args)
    model = add_adapters(args, load_model(args, noise=args), run)
    data = load_training(args, model.tokenize, run)
    encoder = build_encoder(args, run, model, data)
    check_before_start(args, run, model, data, encoder)
    set_up_kernels(args, run, model)

    parameters = model.trained_parameters()
    ema = build_ema(args, parameters, start=None)
    optimizer = build_optimizer(args, model, data.batch_sampler.total_batch_size)

    # What is saved, and where we left off
    session = Session(args, run, model, data, encoder, ema, optimizer)
    denoiser, optimizer, lr_scheduler = session.prepared

    # The loop
    for step in session.steps():
        for batch in step.micro_batches():
            latents, conditioning = session.encode(batch)  # [n, c, h, w], {name: ...}
            draws = draw_noise(args.seed, batch.step, batch.rows, latents, model.schedule, args)
            with run.accumulate(denoiser, batch):
                predict = partial(denoiser, **conditioning)
                losses = diffusion_loss(predict, model.schedule, latents, draws, args)  # [n]
                step.backward(losses, batch)
        step.clip_and_check(parameters.values())
        optimizer.step()
        lr_scheduler.step()
        ema.update()
        optimizer.zero_grad()
        session.after(step)

    # What is handed over
    save = lambda *result: model.save_lora(*result, session.facts())
    return session.finish(save, key=DIFFUSERS_NAME, loads="load_lora_weights")


if __name__ == "__main__":
    sys.exit(main())
