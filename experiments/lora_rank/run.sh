#!/usr/bin/env bash
# Was rank the bottleneck? Adapters of several ranks and reaches, equal steps, three seeds; each at several scales.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/lora_rank}

train() {  # label, further flags: one run for each seed
  local label=$1; shift
  for seed in 1 2 3; do
    [ -f "$OUT/$label-$seed/pytorch_lora_weights.safetensors" ] || accelerate launch --config_file accelerate_config.yaml \
      train_lora.py --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk --resolution 64 \
      --center_crop --cache_latents --train_batch_size 16 --max_train_steps 500 --proportion_empty_prompts 0.1 \
      --checkpointing_steps 500 --validation_epochs 0 --report_to none --seed "$seed" "$@" --output_dir "$OUT/$label-$seed"
  done
}
for rank in 1 4 16 64; do train "attention-rank-$rank" --rank "$rank" --learning_rate 3e-3; done
for rank in 1 4 16; do train "everywhere-rank-$rank" --rank "$rank" --learning_rate 2e-3 --lora_target_modules all-linear conv; done

python experiments/lora_rank/measure.py "$OUT"
