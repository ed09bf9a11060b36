#!/usr/bin/env bash
# Seed 002's project: 37 captioned images, base and upscaler fine-tuned, both measured at 64 and at 256 px.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/seed_002}
BASE=${BASE:-models/mini-sd}
UPSCALER=${UPSCALER:-models/mini-x4}
ROWS=${ROWS:-8}

[ -d "$OUT/images" ] || python -m finetuning.shapes.write_dataset --output "$OUT/images" --style chalk --train 37 \
  --validation "$ROWS" --leave_out cross star --side 256
[ -f "$OUT/data/conversion.json" ] || python prepare_dataset.py convert imagefolder "$OUT/images" --output "$OUT/data" --max_side 256

train() {  # where to, further flags
  local to=$1; shift
  [ -f "$OUT/$to/model_index.json" ] || accelerate launch --quiet --config_file accelerate_config.yaml \
    train_text_to_image.py --train_data_dir "$OUT/data" --center_crop --train_batch_size 4 --checkpointing_steps 0 \
    --proportion_empty_prompts 0.2 --validation_epochs 0 --resume_from_checkpoint latest --report_to none --seed 0 \
    --output_dir "$OUT/$to" "$@"
}
train base --pretrained_model_name_or_path "$BASE" --resolution 64 --num_train_epochs 20 --learning_rate 2e-4 \
  --checkpointing_epochs 20
# 20 and 40 epochs there
train upscaler --pretrained_model_name_or_path "$UPSCALER" --resolution 256 --patch_size 48 --num_train_epochs 40 \
  --learning_rate 1e-4 --checkpointing_epochs 20

# FID and KID join where Inception's weights are: INCEPTION=FILE
python evaluate_model.py --dataset "$OUT/data" --split validation --resolutions 64 256 --guidance_scale 3 \
  --model "original=$BASE" --model "tuned=$OUT/base" \
  --chain "original, enlarged=$BASE,$UPSCALER" --chain "tuned, enlarged=$OUT/base,$UPSCALER" \
  --chain "tuned, upscaler 20 epochs=$OUT/base,$OUT/upscaler/checkpoint-200" \
  --chain "tuned, upscaler 40 epochs=$OUT/base,$OUT/upscaler/checkpoint-400" \
  --upscaler_steps 8 --upsample_temperature 0.997 --no-noise_floor --general_prompts none \
  --checker finetuning.shapes.checker ${INCEPTION:+--inception_weights "$INCEPTION"} --output_dir "$OUT/report"
python -m models.measure_mini_x4 --data "$OUT/data" --rows "$ROWS" --steps 8 \
  --model "$UPSCALER" "$OUT/upscaler/checkpoint-200" "$OUT/upscaler/checkpoint-400"
