#!/usr/bin/env bash
# When does it learn, and when does it forget? A full fine-tune and a LoRA over 1,000 steps, three seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/forgetting}

train() {  # folder, seed, steps, steps between checkpoints, script, further flags
  local folder=$1 seed=$2 steps=$3 every=$4 script=$5; shift 5
  [ -f "$OUT/$folder/manifest.json" ] || accelerate launch --config_file accelerate_config.yaml "$script" \
    --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk --resolution 64 --center_crop \
    --cache_latents --train_batch_size 16 --max_train_steps "$steps" --proportion_empty_prompts 0.1 \
    --checkpointing_steps "$every" --validation_epochs 0 --report_to none --seed "$seed" "$@" --output_dir "$OUT/$folder"
}
both() {  # ending of the folders' names, seed, steps, steps between checkpoints
  train "full-$2$1" "$2" "$3" "$4" train_text_to_image.py --learning_rate 5e-4
  train "lora-$2$1" "$2" "$3" "$4" train_lora.py --learning_rate 2e-3 --rank 16 --lora_target_modules all-linear conv
}
for seed in 1 2 3; do
  both "" "$seed" 1000 100
  both -early "$seed" 100 10  # the same run's beginning, which every draw being a function of the step makes sure of
done
python experiments/forgetting/measure.py "$OUT"
