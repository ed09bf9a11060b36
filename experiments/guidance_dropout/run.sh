#!/usr/bin/env bash
# How much caption dropout does guidance need? Four shares, three seeds, each generated at five guidance scales.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/guidance_dropout}

for dropout in 0 0.1 0.2 0.5; do
  for seed in 1 2 3; do
    [ -f "$OUT/$dropout-$seed/model_index.json" ] || accelerate launch --quiet --config_file accelerate_config.yaml \
      train_text_to_image.py --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk \
      --resolution 64 --center_crop --cache_latents --train_batch_size 16 --max_train_steps 300 --learning_rate 5e-4 \
      --use_ema --ema_decay 0.99 --proportion_empty_prompts "$dropout" --checkpointing_steps 0 --validation_epochs 0 \
      --report_to none --seed "$seed" --output_dir "$OUT/$dropout-$seed"
  done
done
python experiments/guidance_dropout/measure.py "$OUT"
