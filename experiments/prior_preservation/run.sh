#!/usr/bin/env bash
# Do images that the base has generated keep what the dataset does not show? Five trainings, three seeds each.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
OUT=${OUT:-runs/prior_preservation}
mkdir -p "$OUT"

prior() {  # folder, seeds, N, shapes: of every Nth caption with one of these shapes that may be trained on
  local folder=$1 seeds=$2; shift 2
  [ -f "$OUT/$folder/conversion.json" ] && return
  python -c "import sys; from finetuning.shapes.scenes import single_scenes
captions = [scene.caption for scene in single_scenes(sys.argv[2:]) if not scene.is_held_out]
print(*captions[:: int(sys.argv[1])], sep='\n')" "$@" >"$OUT/$folder.txt"
  # shellcheck disable=SC2086  # seeds are several words
  python generate_images.py --model models/mini-sd --prompts_file "$OUT/$folder.txt" --seed $seeds --guidance_scale 3 \
    --output_dir "$OUT/$folder-generated"
  python prepare_dataset.py convert generated "$OUT/$folder-generated" --output "$OUT/$folder" \
    --validation_fraction 0 --test_fraction 0
}
prior crosses "1 2 3 4" 1 cross
prior both "1 2" 1 cross star
prior ten "1" 4 cross

train() {  # label, further flags: one run for each seed
  local label=$1; shift
  for seed in 1 2 3; do
    [ -f "$OUT/$label-$seed/manifest.json" ] || accelerate launch --config_file accelerate_config.yaml \
      train_text_to_image.py --pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk \
      --resolution 64 --center_crop --cache_latents --train_batch_size 16 --max_train_steps 500 --learning_rate 5e-4 \
      --proportion_empty_prompts 0.1 --checkpointing_steps 500 --validation_epochs 0 --report_to none --seed "$seed" \
      "$@" --output_dir "$OUT/$label-$seed"
  done
}
train none
train crosses --prior_data_dir "$OUT/crosses"
train both --prior_data_dir "$OUT/both"
train ten --prior_data_dir "$OUT/ten"
train quarter --prior_data_dir "$OUT/both" --prior_loss_weight 0.25

python experiments/prior_preservation/measure.py "$OUT"
