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

from finetuning.cli import flag, parse
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.latents import LatentArgs, latent_source
from finetuning.data.reading import DatasetError
from finetuning.data.streams import StreamArgs, load_training, row_order
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs, NoiseSchedule, diffusion_loss, draw_noise
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families.loading import load_model
from finetuning.families.lora_files import DIFFUSERS_NAME
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.files import atomic_result
from finetuning.training.adapters import add_adapters
from finetuning.training.checkpoint import CheckpointArgs, Checkpointer, CheckpointError, NonFinite
from finetuning.training.ema import EMAArgs, build_ema
from finetuning.training.lora_layout import LoraArgs
from finetuning.training.optim import OptimArgs, build_optimizer, build_schedule, learning_rates
from finetuning.training.preflight import check_before_start, choose_attention
from finetuning.training.run import HubUpload, NoUpload, Run, RunArgs
from finetuning.training.validation import Validation, ValidationArgs
from finetuning.training.watch import WatchArgs, build_watch


@dataclass
class Args(
    RunArgs, WatchArgs, ValidationArgs, CheckpointArgs, EMAArgs, OptimArgs, NoiseArgs, LatentArgs,
    BucketArgs, CaptionArgs, StreamArgs, DataArgs, LoraArgs, ModelArgs,
):  # fmt: skip
    """Every flag, group by group; here those whose defaults differ, as in diffusers' LoRA script."""

    output_dir: str = flag("sd-model-finetuned-lora")
    num_validation_images: int = flag(4)
    validation_epochs: int = flag(1)


def main(argv=None):
    """Train, and return the exit status."""
    args = parse(Args, __doc__, argv)
    run = Run(args)
    try:
        return train(args, run)
    except (ModelError, DatasetError, CheckpointError, EvaluationError, NonFinite) as problem:
        run.say(f"{type(problem).__name__}: {problem}")
        return 1
    except KeyboardInterrupt:
        run.say("interrupted before the first step: nothing was trained")
        return 130


def train(args, run):
    """One run from the first step, or from a checkpoint, to the last."""
    # What we train, and on what
    model = add_adapters(args, load_model(args, args.prediction_type, args.seed), run)
    training, held_out = load_training(
        args, model.tokenizer, args.seed, args.validation_fraction, run.say, args.cache_dir
    )
    order = row_order(args, training, run.accelerator.num_processes, run.accelerator.process_index)
    total_steps = args.max_train_steps or args.num_train_epochs * order.steps_per_epoch
    check_before_start(args, run, model, training, held_out, order, total_steps)
    choose_attention(args, run, model)

    trained = model.trained_parameters()
    ema = build_ema(args, trained, start=None)
    optimizer = build_optimizer(args, model.parameter_groups(*learning_rates(args, order.total_batch_size)))
    schedule = NoiseSchedule.of(model.scheduler)

    # What is saved, and where we left off
    checkpoints = Checkpointer(args, model, ema, optimizer, run, order, training.fingerprint())
    first_step = checkpoints.resume(total_steps)
    rate = build_schedule(args, optimizer, total_steps, first_step)
    encode = latent_source(args, model, training, args.seed, run.device)
    validation = Validation(run, args, model, ema, schedule, held_out, args, args.train_batch_size)
    watch = build_watch(args, run, model, ema, schedule, held_out, first_step, total_steps)
    denoiser, stepper = run.prepare(model.denoiser, optimizer)
    upload = HubUpload(run, tags=("lora", "stable-diffusion")) if args.push_to_hub and run.is_main else NoUpload()
    run.begin(first_step, total_steps)
    enough = watch.look(first_step)
    if first_step < total_steps and validation.due(first_step, order.steps_per_epoch):
        validation.look(first_step)

    # The loop: a batch here is a micro-batch; its optimizer step may have several
    step, step_loss, step_rows = first_step, 0.0, []
    last_step = first_step if enough else total_steps
    batches = training.loader(order, first_step, last_step, args.dataloader_num_workers, run.device.type != "cpu")
    for batch in batches:
        batch = batch.to(run.device)
        model.enter(batch)
        latents = encode(batch)
        draws = draw_noise(args.seed, batch.step, batch.rows, latents, schedule, args)
        with run.accumulate(denoiser, batch):
            predict = partial(denoiser, input_ids=batch.input_ids)
            losses = diffusion_loss(predict, schedule, latents, draws, args)  # [batch]
            step_loss += run.backward(losses, batch.weights)
        step_rows += batch.rows
        if not batch.ends_step:
            continue

        step_loss = run.total(step_loss)
        norm = run.clip(trained.values())
        run.check_finite(step_loss, norm, training, step_rows)
        used_rate = optimizer.param_groups[0]["lr"]
        stepper.step()
        rate.step()
        ema.update()
        stepper.zero_grad()
        step += 1
        run.log({"train_loss": step_loss, "lr": used_rate, "grad_norm": norm.item()}, step)
        run.tick(loss=step_loss, lr=used_rate)
        step_loss, step_rows = 0.0, []

        enough = watch.look(step)
        stopping = run.any(run.stop_signal is not None)
        if stopping or enough or step == total_steps or run.any(checkpoints.due(step)):
            checkpoints.save(step)
        if stopping:
            run.finish()
            run.say(f"stopped after step {step} of {total_steps}; go on with --resume_from_checkpoint latest")
            return 128 + (run.stop_signal or 15)
        if enough:
            break
        if step < total_steps and validation.due(step, order.steps_per_epoch):
            validation.look(step)

    # What is handed over
    validation.look(step)
    if run.is_main:
        facts = {
            "steps": step, "images": order.rows, "dataset_hash": training.fingerprint(),
            "dataset": args.train_data_dir or args.dataset_name, "caption_prefix": training.caption_prefix(),
        }  # fmt: skip
        atomic_result(run.output_dir, lambda folder: model.save_lora(folder, ema.shadow, facts), key=DIFFUSERS_NAME)
        run.say(f"LoRA: {run.output_dir / DIFFUSERS_NAME} (loaded back and compared; load_lora_weights loads it)")
        if grid := validation.compare(step):
            run.say(f"base beside fine-tuned: {grid}")
    uploaded = upload.push()
    run.finish()
    return 0 if uploaded else 1


if __name__ == "__main__":
    sys.exit(main())
