#!/usr/bin/env bash
# Does it matter where the average starts? The same training three times over, averaged in three ways; three seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/ema_start}

average() {  # label, decay, further flags: one run each
  local label=$1 decay=$2; shift 2
  for seed in 1 2 3; do
    [ -f "$OUT/$label-$seed/model_index.json" ] || accelerate launch --config_file accelerate_config.yaml train_text_to_image.py \
      --pretrained_model_name_or_path models/mini-sd --non_ema_variant non_ema --train_data_dir datasets/chalk \
      --resolution 64 --center_crop --cache_latents --train_batch_size 16 --max_train_steps 500 --learning_rate 5e-4 \
      --proportion_empty_prompts 0.1 --checkpointing_steps 500 --validation_epochs 0 --report_to none --seed "$seed" \
      --use_ema --ema_decay "$decay" "$@" --output_dir "$OUT/$label-$seed"
  done
}
average ramp 0.9999 --ema_start ramp
average warm-22 0.997 --ema_start warm      # 0.997^500 = 0.223 of the base is left, as of 0.9999 after 15,000 steps
average warm-67 0.9992 --ema_start warm     # 0.9992^500 = 0.670 of the base is left, as of 0.9999 after 4,000 steps

measure() {  # model, label, further flags
  local model=$1 label=$2; shift 2
  for shapes in "circle square triangle diamond" "cross star"; do
    # shellcheck disable=SC2086  # several shapes
    python -m models.measure_mini_sd --model "$model" "$@" --shapes $shapes --captions 256 --output_dir "$OUT/measured/$label/${shapes%% *}"
  done
}
for seed in 1 2 3; do
  for label in ramp warm-22 warm-67; do measure "$OUT/$label-$seed" "$label-$seed"; done
  measure "$OUT/ramp-$seed/checkpoint-500" "raw-$seed" --weights raw
done
measure models/mini-sd base
python experiments/ema_start/table.py "$OUT/measured"
