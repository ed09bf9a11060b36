#!/usr/bin/env bash
# One experiment: edit the values, or set them from outside, and run this file.
#
#     bash finetune.sh                                       # the miniature Stable Diffusion on images in chalk
#     PRESET=sd15-t4 TRAIN_DIR=photos bash finetune.sh       # Stable Diffusion 1.5 on your images; presets: see below
#     METHOD=lora STEPS=1000 bash finetune.sh                # every variable of this file can be set like this
#     OUTPUT_DIR=runs/chalk-full/20261121-101500 RESUME=latest bash finetune.sh      # resume an interrupted run
#
# As shipped it takes minutes, on any CPU, offline.
set -euo pipefail
cd "$(dirname "$0")"

# --- What is trained ----------------------------------------------------------------------------------------------
: "${PRESET:=}"        # a name from the list below, which fills everything left empty here; empty: mini-sd
: "${MODEL_NAME:=}"    # folder of a diffusers pipeline, or its name on the Hub; empty: the preset's
: "${METHOD:=}"        # full: every weight of the UNet. lora: small adapters on it, in a file of megabytes

# --- On what ------------------------------------------------------------------------------------------------------
: "${TRAIN_DIR:=}"     # your folder of images with metadata.jsonl; empty: datasets/chalk, for mini-sd
: "${DATASET_NAME:=}"  # or a dataset of the Hugging Face Hub; wins over TRAIN_DIR
: "${PROMPTS:=}"       # generated with the same seeds before, during and after, separated by |; empty: the preset's

# --- How long -----------------------------------------------------------------------------------------------------
: "${STEPS:=}"         # optimizer steps; empty: the preset's
: "${LR:=}"            # learning rate; empty: the preset's
: "${SEED:=1337}"

# --- Where to -----------------------------------------------------------------------------------------------------
: "${OUTPUT_DIR:=}"    # empty: runs/DATASET-PRESET/DATE-TIME
: "${RESUME:=}"        # latest, with the OUTPUT_DIR of the run to resume

# --- The presets --------------------------------------------------------------------------------------------------
PRESETS="mini-sd sd15-t4 sd15-lora-t4 sd15-locon-t4 sd14-a6000 unsplash-lite sdxl-lora-16gb sdxl-lora-24gb \
sdxl-24gb sdxl-48gb"
fail() { printf 'finetune.sh: %s\n' "$@" >&2; exit 2; }

if [ -z "$PRESET" ] && [ -z "$MODEL_NAME" ]; then
  case "$DATASET_NAME:$TRAIN_DIR" in
    : | :datasets/chalk | :datasets/chalk/ | :datasets/shapes | :datasets/shapes/) ;;
    *) fail "models/mini-sd knows only coloured shapes and cannot learn ${DATASET_NAME:-$TRAIN_DIR}." \
            "Choose what to train with PRESET=NAME, e.g. PRESET=sd15-lora-t4 (known: $PRESETS), or with MODEL_NAME." ;;
  esac
fi
: "${PRESET:=mini-sd}"
SD15=stable-diffusion-v1-5/stable-diffusion-v1-5  # runwayml/... has left the Hub; this replaces it
: "${XFORMERS=--enable_xformers_memory_efficient_attention}"  # set but empty: PyTorch's own attention
SDXL=stabilityai/stable-diffusion-xl-base-1.0
SD_USUAL="--center_crop --random_flip --max_grad_norm 1 --lr_scheduler constant --lr_warmup_steps 0 $XFORMERS"
SDXL_USUAL="--aspect_buckets --proportion_empty_prompts 0.1 --lr_scheduler constant --lr_warmup_steps 0 $XFORMERS"
SDXL_FP16="--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --max_grad_norm 1 $SDXL_USUAL"

case "$PRESET" in
  mini-sd)        # The embedded miniature, minutes on a CPU
    : "${MODEL_NAME:=models/mini-sd}" "${TRAIN_DIR:=datasets/chalk}" "${STEPS:=500}"
    : "${RESOLUTION:=64}" "${BATCH:=16}" "${ACCUMULATION:=1}" "${CHECKPOINTING_STEPS:=100}"
    : "${EXTRA:=--center_crop --cache_latents --proportion_empty_prompts 0.1 --max_grad_norm 1}"
    : "${GUIDANCE:=3}" "${VALIDATION_STEPS:=100}"
    : "${PROMPTS:=a large red circle on a white background|a small blue square on a pink background|\
a large green triangle on a black background|a large purple star on a white background|\
a small orange cross on a gray background|a small yellow diamond above a large blue circle on a black background}"
    ;;
  sd15-t4)        # Stable Diffusion 1.5, every weight, on a T4 (16 GB)
    : "${MODEL_NAME:=$SD15}" "${STEPS:=4000}" "${LR:=1e-5}" "${USE_EMA:=no}"
    : "${BATCH:=1}" "${ACCUMULATION:=4}"
    : "${EXTRA:=--use_8bit_adam --gradient_checkpointing $SD_USUAL}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  sd15-lora-t4)   # Stable Diffusion 1.5, LoRA, on a T4. The run of 2023-06-03; for that of 2023-06-04, RANK=64
    : "${METHOD:=lora}" "${MODEL_NAME:=$SD15}" "${STEPS:=15000}" "${LR:=1e-4}"
    : "${RANK:=4}" "${TARGETS:=attention}"
    : "${BATCH:=1}" "${ACCUMULATION:=4}" "${CHECKPOINTS_KEPT:=30}"
    : "${EXTRA:=--random_flip --lr_scheduler cosine --lr_warmup_steps 0 --dataloader_num_workers 8 --save_kohya $XFORMERS}"
    : "${PROMPTS:=interior design, a living room with a brown couch|Yoda}"  # a keyword belongs into every caption
    ;;
  sd15-locon-t4)  # Stable Diffusion 1.5, LoRA on every layer and on the text encoder, on a T4
    : "${METHOD:=lora}" "${MODEL_NAME:=$SD15}" "${STEPS:=3000}" "${LR:=1e-4}"
    : "${RANK:=16}" "${TARGETS:=all-linear conv}"
    : "${BATCH:=1}" "${ACCUMULATION:=4}"
    : "${EXTRA:=--train_text_encoder --text_encoder_rank 4 --text_encoder_lr 2e-5 --use_8bit_adam --save_kohya \
--gradient_checkpointing $SD_USUAL}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  sd14-a6000)     # Stable Diffusion 1.4, EMA and non-EMA weights, on an A6000 (48 GB)
    # The run of 2023-06-16 whose results were good. Its dataset, lambdalabs/pokemon-blip-captions, has left the Hub.
    # For SD 1.5: MODEL_NAME=$SD15 NON_EMA_REVISION= NON_EMA_VARIANT=non_ema
    : "${MODEL_NAME:=CompVis/stable-diffusion-v1-4}" "${STEPS:=15000}" "${LR:=1e-4}" "${EMA_DECAY:=0.9999}"
    : "${NON_EMA_REVISION=non-ema}"
    : "${BATCH:=8}" "${ACCUMULATION:=1}"
    : "${EXTRA:=--gradient_checkpointing $SD_USUAL}"
    : "${PROMPTS:=A modern living room with a brown couch|A rustic living room|Yoda}"
    ;;
  unsplash-lite)  # Stable Diffusion 1.5, every weight and EMA, a short first run
    : "${MODEL_NAME:=$SD15}" "${TRAIN_DIR:=imagefolder}" "${STEPS:=150}" "${LR:=1e-5}" "${EMA_DECAY:=0.9999}"
    : "${BATCH:=1}" "${ACCUMULATION:=4}" "${CHECKPOINTING_STEPS:=50}" "${VALIDATION_STEPS:=50}"
    : "${EXTRA:=--gradient_checkpointing $SD_USUAL}"
    : "${PROMPTS:=there is a brown dog sitting on a couch with a yellow pillow}"
    ;;
  sdxl-lora-16gb)  # Stable Diffusion XL, LoRA on the attention, on a card of 16 GB
    : "${METHOD:=lora}" "${MODEL_NAME:=$SDXL}" "${STEPS:=3000}" "${LR:=1e-4}" "${RESOLUTION:=1024}"
    : "${RANK:=16}" "${TARGETS:=attention}"
    : "${BATCH:=1}" "${ACCUMULATION:=4}"
    : "${EXTRA:=--gradient_checkpointing --use_8bit_adam --save_kohya $SDXL_FP16}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  sdxl-lora-24gb)  # Stable Diffusion XL, LoRA on every linear layer and on both text encoders, on a card of 24 GB
    : "${METHOD:=lora}" "${MODEL_NAME:=$SDXL}" "${STEPS:=3000}" "${LR:=1e-4}" "${RESOLUTION:=1024}"
    : "${RANK:=32}" "${TARGETS:=all-linear}"
    : "${BATCH:=2}" "${ACCUMULATION:=2}"
    : "${EXTRA:=--train_text_encoder --text_encoder_rank 8 --text_encoder_lr 5e-5 1e-5 --gradient_checkpointing \
--use_8bit_adam --save_kohya $SDXL_FP16}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  sdxl-24gb)       # Stable Diffusion XL, every weight of the UNet, kept in bf16, on a card of 24 GB that knows bf16
    : "${MODEL_NAME:=$SDXL}" "${STEPS:=4000}" "${LR:=1e-5}" "${USE_EMA:=no}" "${RESOLUTION:=1024}"
    : "${BATCH:=1}" "${ACCUMULATION:=1}"
    : "${EXTRA:=--mixed_precision bf16 --weights_precision bf16 --optimizer adafactor --fused_backward_pass \
--gradient_checkpointing --cached_crops 4 --max_grad_norm 0 $SDXL_USUAL}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  sdxl-48gb)       # Stable Diffusion XL, every weight of the UNet, on a card of 48 GB
    : "${MODEL_NAME:=$SDXL}" "${STEPS:=4000}" "${LR:=1e-5}" "${USE_EMA:=no}" "${RESOLUTION:=1024}"
    : "${BATCH:=2}" "${ACCUMULATION:=4}"
    : "${EXTRA:=--gradient_checkpointing --use_8bit_adam $SDXL_FP16}"
    : "${PROMPTS:=A modern living room with a brown couch|Yoda}"
    ;;
  *) fail "PRESET=$PRESET does not exist; known: $PRESETS" ;;
esac
[ -n "$DATASET_NAME$TRAIN_DIR" ] || fail "PRESET=$PRESET needs TRAIN_DIR=FOLDER of your images, or DATASET_NAME"

# --- What no preset has said --------------------------------------------------------------------------------------
: "${METHOD:=full}"
: "${RESOLUTION:=512}"
: "${BATCH:=1}"                   # images per forward pass
: "${ACCUMULATION:=1}"            # forward passes per optimizer step
if [ "$METHOD" = lora ]; then
  : "${LR:=2e-3}"                 # for mini-sd; Stable Diffusion 1.5 wants 1e-4
  : "${RANK:=16}"
  : "${TARGETS:=all-linear conv}" # layers that get an adapter; attention: the usual choice for Stable Diffusion 1.5
  : "${USE_EMA:=no}"
else
  : "${LR:=5e-4}"                 # for mini-sd; Stable Diffusion 1.5 wants 1e-5
  : "${USE_EMA:=yes}"
fi
: "${EMA_DECAY:=0.99}"            # 0.9999 for runs of thousands of steps
: "${NON_EMA_REVISION:=}"         # git revision of the model whose UNet is trained; the EMA starts from the main one
: "${NON_EMA_VARIANT:=}"          # the same for models that keep both in one place (files named *.non_ema.safetensors)
: "${CHECKPOINTING_STEPS:=500}"
: "${CHECKPOINTS_KEPT:=2}"
: "${GUIDANCE:=7.5}"              # guidance scale of the validation images
: "${VALIDATION_STEPS:=500}"
: "${EXTRA:=}"                    # the preset's other flags; setting it replaces them
: "${MORE:=}"                     # any further flag: python train_text_to_image.py --help
: "${REPORT_TO:=tensorboard}"     # or wandb, all, none
# Devices and precision come from accelerate_config.yaml. --quiet: our message is the last, not the launcher's traceback
: "${LAUNCH:=accelerate launch --quiet --config_file accelerate_config.yaml}"

# --- The launch ---------------------------------------------------------------------------------------------------
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
if [ -n "$DATASET_NAME" ]; then DATA=(--dataset_name "$DATASET_NAME"); else DATA=(--train_data_dir "$TRAIN_DIR"); fi
DATA_NAME=$(basename "$(realpath -m -- "${DATASET_NAME:-$TRAIN_DIR}")")
if [ "$PRESET" = mini-sd ]; then RUN_NAME=$METHOD; else RUN_NAME=$PRESET; fi
: "${OUTPUT_DIR:=runs/$DATA_NAME-$RUN_NAME/$(date "+%Y%m%d-%H%M%S")}"
EMA=(); [ "$USE_EMA" = yes ] && EMA=(--use_ema --ema_decay "$EMA_DECAY")
IFS='|' read -r -a PROMPT_LIST <<<"$PROMPTS"
case "$METHOD" in
  full) SCRIPT=train_text_to_image.py ADAPTERS=() ;;
  lora) SCRIPT=train_lora.py; read -r -a WORDS <<<"$TARGETS"
        ADAPTERS=(--rank "$RANK" --lora_target_modules "${WORDS[@]}" --num_validation_images 1) ;;
  *) fail "METHOD=$METHOD must be full or lora" ;;
esac

export -n RANK  # set from outside it would reach the launcher, which numbers its processes by this name
# shellcheck disable=SC2086  # LAUNCH, EXTRA and MORE are meant to be split into words
$LAUNCH "$SCRIPT" \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  ${NON_EMA_REVISION:+--non_ema_revision "$NON_EMA_REVISION"} \
  ${NON_EMA_VARIANT:+--non_ema_variant "$NON_EMA_VARIANT"} \
  "${DATA[@]}" \
  "${EMA[@]}" \
  "${ADAPTERS[@]}" \
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
  --validation_prompts "${PROMPT_LIST[@]}" \
  --validation_steps "$VALIDATION_STEPS" \
  --validation_guidance_scale "$GUIDANCE" \
  --report_to "$REPORT_TO" \
  $EXTRA $MORE &

# The launcher keeps SIGTERM to itself, so it is passed on to the training process, which saves a checkpoint first.
# Ctrl-C reaches that process by itself.
LAUNCHER=$!
trap 'pkill -TERM -P $LAUNCHER || kill -TERM $LAUNCHER || :' TERM
trap : INT
STATUS=0; wait $LAUNCHER || STATUS=$?
while kill -0 $LAUNCHER 2>/dev/null; do STATUS=0; wait $LAUNCHER || STATUS=$?; done
[ "$STATUS" = 0 ] || exit "$STATUS"

# --- What to look at, and what to do next -------------------------------------------------------------------------
command_line() { printf '  python'; printf ' %q' "$@"; printf '\n'; }  # paths may have spaces and quotes
if [ "$METHOD" = lora ]; then
  GENERATE=(--model "$MODEL_NAME" --lora "$OUTPUT_DIR" --lora_scale 0 0.5 0.8 1)
  TUNED=(--lora "tuned=$OUTPUT_DIR") MERGE=(fuse --base "$MODEL_NAME" --lora "$OUTPUT_DIR" --scale 0.75)
else
  GENERATE=(--model "base=$MODEL_NAME" "tuned=$OUTPUT_DIR")
  TUNED=(--model "tuned=$OUTPUT_DIR") MERGE=(--base "$MODEL_NAME" --tuned "$OUTPUT_DIR" --ratio 0.5 0.7)
fi
printf '\nDone. Look at\n  %s     base and fine-tuned, same prompts and seeds\n' "$OUTPUT_DIR/comparison.png"
printf '  tensorboard --logdir %q\n' "$OUTPUT_DIR/logs"
printf 'Generate more images:\n'
command_line generate_images.py "${GENERATE[@]}" --guidance_scale "$GUIDANCE" --prompt "${PROMPT_LIST[0]}"
if [ -z "$DATASET_NAME" ]; then
  EVALUATE=(--model "original=$MODEL_NAME" "${TUNED[@]}" --dataset "$TRAIN_DIR")
  # One image has no interval: then the images that were trained on have to do
  held_out='validation\|valid\|val\|eval\|dev'
  images_in() { { cd "$TRAIN_DIR" && find . -type f -iregex "\./\($1\)/.*" ! -name 'metadata.*'; } 2>/dev/null | wc -l; }
  if [ "$(images_in "$held_out")" -ge 2 ]; then
    EVALUATE+=(--split validation)
  elif [ "$(images_in "train\|training\|test\|testing\|$held_out")" -ge 1 ]; then EVALUATE+=(--split train); fi
  if [ "$TRAIN_DIR" = datasets/chalk ]; then
    EVALUATE+=(--general_prompts datasets/left_out_of_chalk.txt --checker finetuning.shapes.checker)
  fi
  printf 'Did it learn, and what did it forget?\n'
  command_line evaluate_model.py "${EVALUATE[@]}" --guidance_scale "$GUIDANCE" --output_dir "$OUTPUT_DIR-report"
fi
printf 'Merge with the base:\n'
command_line merge_checkpoints.py "${MERGE[@]}" --output_dir "$OUTPUT_DIR-merged"
if [ "$PRESET" = mini-sd ]; then
  printf 'Next, a real Stable Diffusion on your images: PRESET=sd15-lora-t4 TRAIN_DIR=FOLDER bash finetune.sh\n'
fi
