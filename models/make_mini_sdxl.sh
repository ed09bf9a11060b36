#!/usr/bin/env bash
# Make models/mini-sdxl from models/mini-sd: grow it to SDXL's shape, train all of it, then measure it: 70 minutes on two
# cores of a CPU. See its README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
BUILD=${BUILD:-build/mini-sdxl}
STEPS=${STEPS:-4000}

[ -f "$BUILD/images/metadata.jsonl" ] || python -m models.grow_mini_sdxl --output_dir "$BUILD/start" --images "$BUILD/images"
accelerate launch --config_file accelerate_config.yaml --mixed_precision no train_text_to_image.py \
  --pretrained_model_name_or_path "$BUILD/start" --train_text_encoder \
  --train_data_dir "$BUILD/images" --resolution 64 --output_dir "$BUILD/run" --check_images none \
  --use_ema --ema_decay 0.99 \
  --train_batch_size 32 --max_train_steps "$STEPS" --seed 0 \
  --learning_rate 8e-4 --lr_scheduler cosine --lr_warmup_steps 50 --adam_beta2 0.99 \
  --snr_gamma 5 --proportion_empty_prompts 0.1 \
  --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest
python -m models.finish_mini_sd --run "$BUILD/run" --output_dir models/mini-sdxl --only_average
python -m models.measure_mini_sd --model models/mini-sdxl --output_dir "$BUILD/accuracy"
python -m models.measure_sizes --model models/mini-sdxl --output_dir "$BUILD/sizes"
cp "$BUILD/accuracy/samples.png" "$BUILD/accuracy/accuracy.json" models/mini-sdxl/
