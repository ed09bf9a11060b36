#!/usr/bin/env bash
# Make models/mini-x4 from nothing: an upscaler from 64 to 256 pixels for the shapes world. See its README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
BUILD=${BUILD:-build/mini-x4}
STEPS=${STEPS:-4500}

[ -f "$BUILD/data/validation/metadata.jsonl" ] || python -m finetuning.shapes.write_dataset --output "$BUILD/data" \
  --style filled chalk --train 4000 --validation 128 --side 256
[ -f "$BUILD/start/model_index.json" ] || python -m models.make_start --preset mini-x4 --prediction_type sample \
  --output_dir "$BUILD/start"
accelerate launch --quiet --config_file accelerate_config.yaml --mixed_precision no train_text_to_image.py \
  --pretrained_model_name_or_path "$BUILD/start" --train_text_encoder \
  --train_data_dir "$BUILD/data" --resolution 256 --center_crop --patch_size 48 --output_dir "$BUILD/run" \
  --use_ema --ema_decay 0.995 \
  --train_batch_size 8 --max_train_steps "$STEPS" --seed 0 \
  --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 100 --adam_beta2 0.99 \
  --timestep_bias_strategy later --timestep_bias_portion 0.5 --timestep_bias_multiplier 3 \
  --max_noise_level 50 --proportion_empty_prompts 0.1 \
  --checkpointing_steps 250 --checkpoints_total_limit 2 --resume_from_checkpoint latest --validation_steps 1000 \
  --validation_loss_rows 64
python -m models.finish_mini_sd --run "$BUILD/run" --output_dir models/mini-x4 --only_average
python -m models.measure_mini_x4 --data "$BUILD/data" --model models/mini-x4 --output_dir models/mini-x4
