#!/usr/bin/env bash
# Make models/mini-sd from nothing: autoencoder, images, UNet and text encoder, then measure it. See its README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
BUILD=${BUILD:-build/mini-sd}
VAE_STEPS=${VAE_STEPS:-8000}
STEPS=${STEPS:-10000}

[ -f "$BUILD/vae/config.json" ] || python -m models.train_vae --steps "$VAE_STEPS" --output_dir "$BUILD/vae"
[ -f "$BUILD/pretrain/validation/metadata.jsonl" ] || python -m finetuning.shapes.write_dataset --output "$BUILD/pretrain" --train 30000 --validation 512
python -m models.make_start --vae "$BUILD/vae" --output_dir "$BUILD/start"
accelerate launch --config_file accelerate_config.yaml --mixed_precision no train_text_to_image.py \
  --pretrained_model_name_or_path "$BUILD/start" --from_scratch --train_text_encoder \
  --train_data_dir "$BUILD/pretrain" --resolution 64 --center_crop --cache_latents --output_dir "$BUILD/run" \
  --use_ema --ema_decay 0.999 \
  --train_batch_size 64 --max_train_steps "$STEPS" --seed 0 \
  --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 300 --adam_beta2 0.99 \
  --snr_gamma 5 --proportion_empty_prompts 0.1 \
  --checkpointing_steps 500 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_steps 1000 --validation_guidance_scale 3 \
  --validation_prompts "a small red circle on a white background" "a large blue star on a pink background" \
    "a large green cross above a small yellow triangle on a black background" \
    "a small purple diamond to the left of a large orange square on a gray background"
python -m models.finish_mini_sd --run "$BUILD/run" --output_dir models/mini-sd
python -m models.measure_mini_sd --model models/mini-sd --output_dir "$BUILD/accuracy"
cp "$BUILD/accuracy/samples.png" "$BUILD/accuracy/accuracy.json" models/mini-sd/
