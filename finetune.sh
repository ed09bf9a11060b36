#!/usr/bin/env bash
# One experiment: take the # off one preset, or edit the values below it, then `bash finetune.sh`. Every variable can
# also be set from outside:
#
#     STEPS=1000 LR=5e-5 bash finetune.sh
#     METHOD=lora bash finetune.sh                                              # adapters in place of every weight
#     OUTPUT_DIR=runs/chalk-full/20261121-101500 RESUME=latest bash finetune.sh      # go on where a run was interrupted
#
# As shipped it fine-tunes the embedded miniature Stable Diffusion on images in chalk: minutes, on any CPU, offline.
set -euo pipefail
cd "$(dirname "$0")"
NOW=$(date "+%Y%m%d-%H%M%S")
XFORMERS="--enable_xformers_memory_efficient_attention"
SD_USUAL="--center_crop --random_flip --max_grad_norm 1 --lr_scheduler constant --lr_warmup_steps 0 $XFORMERS"
TEXT_ADAPTERS="--train_text_encoder --text_encoder_rank 4 --text_encoder_lr 2e-5"

# --- Preset: Stable Diffusion 1.5, every weight, on a T4 (16 GB) --------------------------------------------------
# : "${MODEL_NAME:=stable-diffusion-v1-5/stable-diffusion-v1-5}"   # runwayml/... has left the Hub; this replaces it
# : "${TRAIN_DIR:=path/to/your/images}" "${OUTPUT_DIR:=runs/sd15-t4/$NOW}"
# : "${RESOLUTION:=512}" "${BATCH:=1}" "${ACCUMULATION:=4}" "${STEPS:=4000}" "${LR:=1e-5}" "${USE_EMA:=no}"
# : "${EXTRA:=--use_8bit_adam --gradient_checkpointing $SD_USUAL}" "${CHECKPOINTING_STEPS:=500}"
# : "${GUIDANCE:=7.5}" "${VALIDATION_STEPS:=500}" "${PROMPTS:=A modern living room with a brown couch|Yoda}"

# --- Preset: Stable Diffusion 1.4, EMA and non-EMA weights, on an A6000 (48 GB) -----------------------------------
# The run of 2023-06-16 whose results were good. Its dataset, lambdalabs/pokemon-blip-captions, has left the Hub: use
# your own images in TRAIN_DIR, or a captioned Hub dataset in DATASET_NAME.
# For SD 1.5: MODEL_NAME as above, and NON_EMA_VARIANT:=non_ema in place of NON_EMA_REVISION.
# : "${MODEL_NAME:=CompVis/stable-diffusion-v1-4}" "${NON_EMA_REVISION:=non-ema}"
# : "${TRAIN_DIR:=path/to/your/images}" "${OUTPUT_DIR:=runs/sd14-a6000/$NOW}"
# : "${RESOLUTION:=512}" "${BATCH:=8}" "${ACCUMULATION:=1}" "${STEPS:=15000}" "${LR:=1e-4}" "${EMA_DECAY:=0.9999}"
# : "${EXTRA:=--gradient_checkpointing $SD_USUAL}" "${CHECKPOINTING_STEPS:=500}"
# : "${GUIDANCE:=7.5}" "${VALIDATION_STEPS:=500}"
# : "${PROMPTS:=A modern living room with a brown couch|A rustic living room|Yoda}"

# --- Preset: Stable Diffusion 1.5, LoRA, on a T4 (16 GB) ----------------------------------------------------------
# The run of 2023-06-03. For that of 2023-06-04, RANK:=64; a keyword belongs into every caption.
# : "${METHOD:=lora}" "${MODEL_NAME:=stable-diffusion-v1-5/stable-diffusion-v1-5}"
# : "${TRAIN_DIR:=path/to/your/images}" "${OUTPUT_DIR:=runs/sd15-lora/$NOW}"
# : "${RANK:=4}" "${TARGETS:=attention}" "${LR:=1e-4}" "${STEPS:=15000}"
# : "${RESOLUTION:=512}" "${BATCH:=1}" "${ACCUMULATION:=4}" "${CHECKPOINTING_STEPS:=500}" "${CHECKPOINTS_KEPT:=30}"
# : "${EXTRA:=--random_flip --lr_scheduler cosine --lr_warmup_steps 0 --dataloader_num_workers 8 --save_kohya $XFORMERS}"
# : "${GUIDANCE:=7.5}" "${VALIDATION_STEPS:=500}" "${PROMPTS:=interior design, a living room with a brown couch|Yoda}"

# --- Preset: Stable Diffusion 1.5, LoRA on every layer and on the text encoder, on a T4 (16 GB) ---------------------
# : "${METHOD:=lora}" "${MODEL_NAME:=stable-diffusion-v1-5/stable-diffusion-v1-5}"
# : "${TRAIN_DIR:=path/to/your/images}" "${OUTPUT_DIR:=runs/sd15-locon/$NOW}"
# : "${RANK:=16}" "${TARGETS:=all-linear conv}" "${LR:=1e-4}" "${STEPS:=3000}"
# : "${RESOLUTION:=512}" "${BATCH:=1}" "${ACCUMULATION:=4}" "${CHECKPOINTING_STEPS:=500}"
# : "${EXTRA:=$TEXT_ADAPTERS --use_8bit_adam --save_kohya --gradient_checkpointing $SD_USUAL}"
# : "${GUIDANCE:=7.5}" "${VALIDATION_STEPS:=500}" "${PROMPTS:=A modern living room with a brown couch|Yoda}"

# --- Preset: unsplash-lite, a short first run ---------------------------------------------------------------------
# : "${MODEL_NAME:=stable-diffusion-v1-5/stable-diffusion-v1-5}"
# : "${TRAIN_DIR:=imagefolder}" "${OUTPUT_DIR:=unsplash-lite-v1}"
# : "${RESOLUTION:=512}" "${BATCH:=1}" "${ACCUMULATION:=4}" "${STEPS:=150}" "${LR:=1e-05}" "${EMA_DECAY:=0.9999}"
# : "${EXTRA:=--gradient_checkpointing $SD_USUAL}" "${CHECKPOINTING_STEPS:=50}"
# : "${GUIDANCE:=7.5}" "${VALIDATION_STEPS:=50}" "${PROMPTS:=there is a brown dog sitting on a couch with a yellow pillow}"

# --- The values: what is trained, on what, where it goes ----------------------------------------------------------
: "${METHOD:=full}"               # full: every weight of the UNet. lora: small adapters on it, in a file of megabytes
: "${MODEL_NAME:=models/mini-sd}"
: "${NON_EMA_REVISION:=}"         # git revision of the model whose UNet is trained; the EMA starts from the main one
: "${NON_EMA_VARIANT:=}"          # the same for models that keep both in one place (files named *.non_ema.safetensors)
: "${TRAIN_DIR:=datasets/chalk}"  # folder of images with metadata.jsonl
: "${DATASET_NAME:=}"             # or a dataset of the Hugging Face Hub; wins over TRAIN_DIR
: "${OUTPUT_DIR:=runs/chalk-$METHOD/$NOW}"
: "${RESUME:=}"                   # latest, with the OUTPUT_DIR of the run to go on with

# How
: "${RESOLUTION:=64}"
: "${BATCH:=16}"
: "${ACCUMULATION:=1}"
: "${STEPS:=500}"
: "${SEED:=1337}"
if [ "$METHOD" = lora ]; then
  : "${LR:=2e-3}"                 # adapters want more than the weights themselves; 1e-4 for Stable Diffusion 1.5
  : "${RANK:=16}"
  : "${TARGETS:=all-linear conv}" # which layers get an adapter; attention: the usual choice for Stable Diffusion 1.5
  : "${USE_EMA:=no}"
else
  : "${LR:=5e-4}"
  : "${USE_EMA:=yes}"
fi
: "${EMA_DECAY:=0.99}"            # 0.9999 for runs of thousands of steps
: "${CHECKPOINTING_STEPS:=100}"
: "${CHECKPOINTS_KEPT:=2}"
: "${EXTRA:=--center_crop --cache_latents --proportion_empty_prompts 0.1 --max_grad_norm 1}"  # any other flag, see --help

# What is looked at: the same prompts and seeds, before, during and after, separated by |
: "${GUIDANCE:=3}"
: "${VALIDATION_STEPS:=100}"
: "${PROMPTS:=a large red circle on a white background|a small blue square on a pink background|\
a large green triangle on a black background|a large purple star on a white background|\
a small orange cross on a gray background|a small yellow diamond above a large blue circle on a black background}"

# --- The launch: devices and precision come from accelerate_config.yaml -------------------------------------------
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
if [ -n "$DATASET_NAME" ]; then DATA=(--dataset_name "$DATASET_NAME"); else DATA=(--train_data_dir "$TRAIN_DIR"); fi
EMA=(); [ "$USE_EMA" = yes ] && EMA=(--use_ema --ema_decay "$EMA_DECAY")
IFS='|' read -r -a PROMPT_LIST <<<"$PROMPTS"
case "$METHOD" in
  full) SCRIPT=train_text_to_image.py ADAPTERS=() ;;
  lora) SCRIPT=train_lora.py; read -r -a WORDS <<<"$TARGETS"
        ADAPTERS=(--rank "$RANK" --lora_target_modules "${WORDS[@]}" --num_validation_images 1) ;;
  *) echo "finetune.sh: METHOD=$METHOD must be full or lora" >&2; exit 2 ;;
esac

# shellcheck disable=SC2086  # EXTRA is meant to be split into words
accelerate launch --config_file accelerate_config.yaml "$SCRIPT" \
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
  --report_to tensorboard \
  $EXTRA &

# The launcher keeps SIGTERM to itself, so it is passed on to the training process, which saves a checkpoint first.
# Ctrl-C reaches that process by itself.
LAUNCHER=$!
trap 'pkill -TERM -P $LAUNCHER || kill -TERM $LAUNCHER || :' TERM
trap : INT
STATUS=0; wait $LAUNCHER || STATUS=$?
while kill -0 $LAUNCHER 2>/dev/null; do STATUS=0; wait $LAUNCHER || STATUS=$?; done
[ "$STATUS" = 0 ] || exit "$STATUS"

if [ "$METHOD" = lora ]; then
  DRAW="--model $MODEL_NAME --lora $OUTPUT_DIR --lora_scale 0 0.5 0.8 1"
  TUNED="--lora tuned=$OUTPUT_DIR" MERGE="fold --base $MODEL_NAME --lora $OUTPUT_DIR --scale 0.75"
else
  DRAW="--model base=$MODEL_NAME tuned=$OUTPUT_DIR"
  TUNED="--model tuned=$OUTPUT_DIR" MERGE="--base $MODEL_NAME --tuned $OUTPUT_DIR --ratio 0.5 0.7"
fi
if [ "$TRAIN_DIR" = datasets/chalk ]; then TUNED="$TUNED --general_prompts datasets/left_out_of_chalk.txt"; fi
cat <<DONE

Done. Look at
  $OUTPUT_DIR/comparison.png     the same prompts and seeds: the base beside what was trained
  tensorboard --logdir $OUTPUT_DIR/logs
Next, at the top of finetune.sh: a preset for a real Stable Diffusion, TRAIN_DIR (your images), PROMPTS.
Draw more with:    python generate_images.py $DRAW --prompt "..."
Did it work?       python evaluate_model.py --model original=$MODEL_NAME $TUNED \\
                     --dataset "$TRAIN_DIR" --split validation --guidance_scale $GUIDANCE --output_dir $OUTPUT_DIR-report
Mix with the base: python merge_checkpoints.py $MERGE --output_dir $OUTPUT_DIR-merged
DONE
