#!/usr/bin/env bash
# Train a pixel-space model from scratch, by the hybrid and by the simple loss, three seeds; then sweep the guidance scale.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/seed_001}
STEPS=${STEPS:-400}

# The data, as a user makes it: images with captions become a dataset that training reads
[ -d "$OUT/world" ] || python -m finetuning.shapes.write_dataset --output "$OUT/world" --train 2000 --validation 64 --pair_share 0
[ -f "$OUT/data/conversion.json" ] || python prepare_dataset.py convert imagefolder "$OUT/world" --output "$OUT/data" --max_side 64
[ -f "$OUT/start/model_index.json" ] || python -m models.make_start --preset mini-if --output_dir "$OUT/start"

for loss in hybrid simple; do
  case $loss in hybrid) WEIGHT=0.001 ;; simple) WEIGHT=0 ;; esac
  for seed in 1 2 3; do
    [ -f "$OUT/$loss-$seed/model_index.json" ] || accelerate launch --quiet --config_file accelerate_config.yaml \
      train_text_to_image.py --pretrained_model_name_or_path "$OUT/start" --from_scratch --train_text_encoder \
      --train_data_dir "$OUT/data" --resolution 32 --center_crop --train_batch_size 8 --max_train_steps "$STEPS" \
      --vlb_weight "$WEIGHT" --proportion_empty_prompts 0.2 --learning_rate 1e-3 --lr_scheduler cosine \
      --lr_warmup_steps 50 --adam_beta2 0.99 --use_ema --ema_decay 0.99 --checkpointing_minutes 5 \
      --checkpointing_steps 0 --checkpoints_total_limit 1 --resume_from_checkpoint latest --validation_epochs 0 \
      --report_to none --seed "$seed" --output_dir "$OUT/$loss-$seed"
  done
done
python experiments/seed_001/measure.py "$OUT"
