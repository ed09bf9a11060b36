#!/usr/bin/env bash
# One experiment: the variables below, then one `accelerate launch`. Edit them here, or set them from outside:
#
#     STEPS=1000 LR=5e-5 bash finetune.sh
#
# As shipped it fine-tunes the embedded miniature Stable Diffusion on pictures in chalk: minutes, on any CPU, offline.
# Presets for real models on a T4 and an A6000 stand at the end of the variables; take the # off one of them.
set -euo pipefail
cd "$(dirname "$0")"

# What is trained, on what, where it goes
MODEL_NAME=${MODEL_NAME:-models/mini-sd}
NON_EMA_REVISION=${NON_EMA_REVISION:-}   # git revision of the model whose UNet is trained, while the EMA starts from the main one
NON_EMA_VARIANT=${NON_EMA_VARIANT:-}     # the same for models that keep both in one place (files named *.non_ema.safetensors)
TRAIN_DIR=${TRAIN_DIR:-datasets/chalk}   # folder of pictures with metadata.jsonl
DATASET_NAME=${DATASET_NAME:-}           # or a dataset of the Hugging Face Hub; wins over TRAIN_DIR
OUTPUT_DIR=${OUTPUT_DIR:-runs/chalk/$(date "+%Y%m%d-%H%M%S")}
RESUME=${RESUME:-}                       # latest, with OUTPUT_DIR of the run to go on with

# How
RESOLUTION=${RESOLUTION:-64}
BATCH=${BATCH:-16}
ACCUMULATION=${ACCUMULATION:-1}
STEPS=${STEPS:-300}
LR=${LR:-3e-4}
SEED=${SEED:-1337}
USE_EMA=${USE_EMA:-yes}
EMA_DECAY=${EMA_DECAY:-0.99}             # 0.9999 for runs of thousands of steps
CHECKPOINTING_STEPS=${CHECKPOINTING_STEPS:-100}
CHECKPOINTS_KEPT=${CHECKPOINTS_KEPT:-2}
EXTRA=${EXTRA:-"--max_grad_norm 1 --proportion_empty_prompts 0.1"}   # any other flag: train_text_to_image.py --help

# What is looked at: the same prompts and seeds, before, during and after
GUIDANCE=${GUIDANCE:-3}
VALIDATION_STEPS=${VALIDATION_STEPS:-100}
PROMPTS=(
  "a large red circle on a white background"
  "a small blue square on a pink background"
  "a large green triangle on a black background"
  "a large purple star on a white background"
  "a small orange cross on a gray background"
  "a small yellow diamond above a large blue circle on a black background"
)

# --- Preset: Stable Diffusion 1.5, every weight, on a T4 (16 GB) --------------------------------------------------
# MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5   # runwayml/stable-diffusion-v1-5 has left the Hub; this replaces it
# TRAIN_DIR=path/to/your/pictures OUTPUT_DIR=runs/sd15-t4/$(date "+%Y%m%d-%H%M%S")
# RESOLUTION=512 BATCH=1 ACCUMULATION=4 STEPS=4000 LR=1e-5 USE_EMA=no CHECKPOINTING_STEPS=500
# GUIDANCE=7.5 VALIDATION_STEPS=500 PROMPTS=("A modern living room with a brown couch" "Yoda")
# EXTRA="--center_crop --random_flip --use_8bit_adam --gradient_checkpointing --max_grad_norm 1 --lr_scheduler constant
#   --lr_warmup_steps 0 --enable_xformers_memory_efficient_attention"

# --- Preset: Stable Diffusion 1.4, EMA and non-EMA weights, on an A6000 (48 GB) -----------------------------------
# The run of 2023-06-16 whose results were good. Its dataset, lambdalabs/pokemon-blip-captions, has left the Hub: use
# your own pictures in TRAIN_DIR, or a captioned Hub dataset in DATASET_NAME. For SD 1.5, NON_EMA_VARIANT=non_ema.
# MODEL_NAME=CompVis/stable-diffusion-v1-4 NON_EMA_REVISION=non-ema
# TRAIN_DIR=path/to/your/pictures OUTPUT_DIR=runs/sd14-a6000/$(date "+%Y%m%d-%H%M%S")
# RESOLUTION=512 BATCH=8 ACCUMULATION=1 STEPS=15000 LR=1e-4 USE_EMA=yes EMA_DECAY=0.9999 CHECKPOINTING_STEPS=500
# GUIDANCE=7.5 VALIDATION_STEPS=500 PROMPTS=("A modern living room with a brown couch" "A rustic living room" "Yoda")
# EXTRA="--center_crop --random_flip --gradient_checkpointing --max_grad_norm 1 --lr_scheduler constant
#   --lr_warmup_steps 0 --enable_xformers_memory_efficient_attention"

# --- Preset: unsplash-lite, a short first run ---------------------------------------------------------------------
# MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5
# TRAIN_DIR=imagefolder OUTPUT_DIR=unsplash-lite-v1
# RESOLUTION=512 BATCH=1 ACCUMULATION=4 STEPS=150 LR=1e-05 USE_EMA=yes EMA_DECAY=0.9999 CHECKPOINTING_STEPS=50
# GUIDANCE=7.5 VALIDATION_STEPS=50 PROMPTS=("there is a brown dog sitting on a couch with a yellow pillow")
# EXTRA="--center_crop --random_flip --gradient_checkpointing --max_grad_norm 1 --lr_scheduler constant --lr_warmup_steps 0"

# The launch: devices and precision come from accelerate_config.yaml
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
if [ -n "$DATASET_NAME" ]; then DATA=(--dataset_name "$DATASET_NAME"); else DATA=(--train_data_dir "$TRAIN_DIR"); fi
EMA=(); [ "$USE_EMA" = yes ] && EMA=(--use_ema --ema_decay "$EMA_DECAY")

# shellcheck disable=SC2086  # EXTRA is meant to be split into words
accelerate launch --config_file accelerate_config.yaml train_text_to_image.py \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  ${NON_EMA_REVISION:+--non_ema_revision "$NON_EMA_REVISION"} \
  ${NON_EMA_VARIANT:+--non_ema_variant "$NON_EMA_VARIANT"} \
  "${DATA[@]}" \
  "${EMA[@]}" \
  --resolution "$RESOLUTION" \
  --train_batch_size "$BATCH" \
  --gradient_accumulation_steps "$ACCUMULATION" \
  --max_train_steps "$STEPS" \
  --learning_rate "$LR" \
  --seed "$SEED" \
  --output_dir "$OUTPUT_DIR" \
  --checkpointing_steps "$CHECKPOINTING_STEPS" \
  --checkpoints_total_limit "$CHECKPOINTS_KEPT" \
  ${RESUME:+--resume_from_checkpoint "$RESUME"} \
  --validation_prompts "${PROMPTS[@]}" \
  --validation_steps "$VALIDATION_STEPS" \
  --validation_guidance_scale "$GUIDANCE" \
  --report_to tensorboard \
  $EXTRA

cat <<DONE

Done. Look at
  $OUTPUT_DIR/comparison.png     the same prompts and seeds: the base beside what was trained
  tensorboard --logdir $OUTPUT_DIR/logs
Next, at the top of finetune.sh: TRAIN_DIR (your pictures), MODEL_NAME or a preset (a real Stable Diffusion), PROMPTS.
Draw more with: python generate_images.py --model base=$MODEL_NAME tuned=$OUTPUT_DIR --prompt "..."
DONE
