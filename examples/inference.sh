#!/usr/bin/env bash
# Text from each checkpoint that is there: Hugging Face's, the imported, the exported, the fine-tuned.
#
#   examples/inference.sh                         # on this machine
#   sbatch --gpus-per-node=8 examples/inference.sh
#
# README.md has all variables.
#SBATCH --job-name=gpt-oss-inference
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
set -uo pipefail

WORKSPACE=$(realpath -ms "${WORKSPACE:-/workspace}")
MODEL=${MODEL:-20b}
PROMPT=${PROMPT:-Hello, how are you?}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
HF_MODEL=${HF_MODEL:-openai/gpt-oss-$MODEL} # a hub id or a folder; none to leave it out
imported=${MEGATRON_MODEL_PATH:-$WORKSPACE/models/gpt-oss-$MODEL}
exported=${HF_EXPORT_PATH:-$WORKSPACE/models/gpt-oss-$MODEL-hf-export}
tuned=${SFT_CHECKPOINT:-$WORKSPACE/results/gpt_oss_${MODEL}_finetune_tp2_pp2_ep4_spTrue_cp1}
adapter=${ADAPTER:-$WORKSPACE/results/gpt_oss_${MODEL}_lora_tp2_pp2_ep4_spTrue_cp1}
TP=${TP:-2} # any layout will do, whatever the training's was
PP=${PP:-2}
EP=${EP:-2}
read -rd '' -a OPTIONS <<<"${OPTIONS:-}" # any more of generate: --chat --temperature 0.7 ...

run=()
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run=(srun --nodes=1 --ntasks=1 --cpu-bind=none ${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"
        --container-mounts="${CONTAINER_MOUNTS:-$WORKSPACE:$WORKSPACE}"})
fi

status=0 said=''
generate() { # WHAT OPTION...: as many ranks as the layout needs
    echo "== $1"
    said=yes
    ${run[@]+"${run[@]}"} gptoss-convert launch local -- generate "${@:2}" --prompt "$PROMPT" \
        --max-new-tokens "$MAX_NEW_TOKENS" --tp "$TP" --pp "$PP" --ep "$EP" \
        ${OPTIONS[@]+"${OPTIONS[@]}"} || status=$?
}

# What the other scripts make is left out if it is not there; what a variable names has to be.
# shellcheck disable=SC2016 # that shell is to see $1, where the container does
has() { # VALUE OF THE VARIABLE, FOLDER
    [[ $1 || $(${run[@]+"${run[@]}"} sh -c 'if [ -d "$1" ]; then echo yes; fi' sh "$2") ]]
}

if [[ $HF_MODEL != none ]]; then generate "Hugging Face: $HF_MODEL" --hf-model "$HF_MODEL"; fi
if has "${MEGATRON_MODEL_PATH:-}" "$imported"; then
    generate "imported: $imported" --megatron-path "$imported"
fi
if has "${HF_EXPORT_PATH:-}" "$exported"; then
    generate "exported: $exported" --hf-model "$exported"
fi
if has "${SFT_CHECKPOINT:-}" "$tuned"; then
    generate "fine-tuned: $tuned" --megatron-path "$tuned"
fi
if has "${ADAPTER:-}" "$adapter"; then
    generate "adapter: $adapter" --megatron-path "$imported" --adapter "$adapter"
fi
if [[ ! $said ]]; then
    echo "no checkpoint in $WORKSPACE; run conversion.sh first, or name one (README.md)" >&2
    status=1
fi
exit "$status"
