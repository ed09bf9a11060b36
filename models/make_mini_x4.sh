#!/usr/bin/env bash
# Make models/mini-x4 from nothing: an upscaler from 64 to 256 pixels for the shapes world. See its README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
BUILD=${BUILD:-build/mini-x4}
STEPS=${STEPS:-4500}
WHOLE_STEPS=${WHOLE_STEPS:-1000}

[ -f "$BUILD/data/validation/metadata.jsonl" ] || python -m finetuning.shapes.write_dataset --output "$BUILD/data" \
  --style filled chalk --train 4000 --validation 128 --side 256
[ -f "$BUILD/start/model_index.json" ] || python -m models.make_start --preset mini-x4 --prediction_type sample \
  --output_dir "$BUILD/start"
train() {  # where to, from what, further flags
  local to=$1 from=$2; shift 2
  [ -f "$BUILD/$to/model_index.json" ] || accelerate launch --quiet --config_file accelerate_config.yaml --mixed_precision no \
    train_text_to_image.py --pretrained_model_name_or_path "$BUILD/$from" --train_text_encoder \
    --train_data_dir "$BUILD/data" --resolution 256 --center_crop --output_dir "$BUILD/$to" \
    --use_ema --seed 0 --lr_scheduler cosine --adam_beta2 0.99 \
    --timestep_bias_strategy later --timestep_bias_portion 0.5 --timestep_bias_multiplier 3 \
    --max_noise_level 50 --proportion_empty_prompts 0.1 \
    --checkpoints_total_limit 2 --resume_from_checkpoint latest --validation_steps 1000 --validation_loss_rows 64 "$@"
}
train run start --patch_size 48 --train_batch_size 8 --max_train_steps "$STEPS" --learning_rate 1e-3 --lr_warmup_steps 100 \
  --ema_decay 0.995 --checkpointing_steps 250
# Group normalisation sees whole images from here on, as it does when they are generated
train whole run --train_batch_size 1 --max_train_steps "$WHOLE_STEPS" --learning_rate 4e-4 --lr_warmup_steps 20 \
  --ema_decay 0.99 --checkpointing_steps 100
python -m models.finish_mini_sd --run "$BUILD/whole" --output_dir models/mini-x4 --only_average
python -m models.measure_mini_x4 --data "$BUILD/data" --model models/mini-x4 --steps 3 --output_dir models/mini-x4
