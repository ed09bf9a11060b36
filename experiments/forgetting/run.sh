#!/usr/bin/env bash
# When does it learn, and when does it forget? A full fine-tune and a LoRA, a look every 100 steps, three seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/forgetting}

train() {  # label, seed, script, further flags
  local label=$1 seed=$2 script=$3; shift 3
  [ -f "$OUT/$label-$seed/manifest.json" ] || accelerate launch --config_file accelerate_config.yaml "$script" \
    --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk --resolution 64 --center_crop \
    --cache_latents --train_batch_size 16 --max_train_steps 1000 --proportion_empty_prompts 0.1 --checkpointing_steps 100 \
    --validation_epochs 0 --report_to none --seed "$seed" "$@" --output_dir "$OUT/$label-$seed"
}
for seed in 1 2 3; do
  train full "$seed" train_text_to_image.py --learning_rate 5e-4
  train lora "$seed" train_lora.py --learning_rate 2e-3 --rank 16 --lora_target_modules all-linear conv
done
python experiments/forgetting/measure.py "$OUT"
