#!/usr/bin/env bash
# Seed 000's project, flag by flag: augment offline, caption, fine-tune with its optimizer, look at every checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/seed_000}
BASE=${BASE:-models/mini-sd}
EPOCHS=${EPOCHS:-4}

# Two sources, as the campus had a scraper's images and an album: become one dataset
[ -d "$OUT/sources" ] || python -m finetuning.shapes.write_dataset --output "$OUT/sources" --style chalk --train 240 \
  --validation 32 --leave_out cross star
[ -f "$OUT/data/conversion.json" ] || python prepare_dataset.py convert imagefolder "$OUT/sources" --output "$OUT/data" --max_side 64
# 7,500 images became 22,484 there: each image, its mirror and a brighter one
[ -d "$OUT/augmented" ] || python prepare_dataset.py augment "$OUT/data" --output "$OUT/augmented"
# Captions: InstructBLIP there. Its weights are a download of gigabytes; CAPTIONER=instructblip asks for them
if [ -n "${CAPTIONER:-}" ]; then
  python caption_images.py "$OUT/augmented" --captioner "$CAPTIONER" --overwrite
fi

[ -f "$OUT/run/model_index.json" ] || accelerate launch --quiet --config_file accelerate_config.yaml \
  train_text_to_image.py --pretrained_model_name_or_path "$BASE" --train_data_dir "$OUT/augmented" \
  --num_train_epochs "$EPOCHS" --train_batch_size 4 --learning_rate "${LR:-2e-4}" --adam_beta1 0.89 --adam_beta2 0.98 \
  --adam_weight_decay 0.0125 --proportion_empty_prompts 0.2 --resolution 64 --random_resized_crop_scale 1.0 \
  --checkpointing_epochs 1 --checkpointing_steps 0 --resume_from_checkpoint latest --validation_epochs 0 \
  --report_to none --seed 0 --output_dir "$OUT/run"

python experiments/seed_000/measure.py "$OUT" "$BASE"
