#!/usr/bin/env bash
# Is the model merged with its base better than the fine-tuned one? Three seeds, raw and averaged weights, ratios 0 to 1.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/merge_ratio}

for seed in 1 2 3; do
  [ -f "$OUT/tuned-$seed/model_index.json" ] || accelerate launch --config_file accelerate_config.yaml train_text_to_image.py \
    --pretrained_model_name_or_path models/mini-sd --non_ema_variant non_ema --train_data_dir datasets/chalk \
    --resolution 64 --center_crop --cache_latents --train_batch_size 16 --max_train_steps 500 --learning_rate 5e-4 \
    --proportion_empty_prompts 0.1 --checkpointing_steps 100 --validation_epochs 0 --report_to none --seed "$seed" \
    --use_ema --ema_decay 0.9999 --ema_start ramp --output_dir "$OUT/tuned-$seed"
done
python experiments/merge_ratio/measure.py "$OUT"
