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

WORKSPACE=${WORKSPACE:-/workspace}
MODEL=${MODEL:-20b}
PROMPT=${PROMPT:-Hello, how are you?}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
HF_MODEL=${HF_MODEL:-openai/gpt-oss-$MODEL} # a hub id or a folder; none to leave it out
MEGATRON_MODEL_PATH=${MEGATRON_MODEL_PATH:-$WORKSPACE/models/gpt-oss-$MODEL}
HF_EXPORT_PATH=${HF_EXPORT_PATH:-$WORKSPACE/models/gpt-oss-$MODEL-hf-export}
SFT_CHECKPOINT=${SFT_CHECKPOINT:-$WORKSPACE/results/gpt_oss_${MODEL}_finetune_tp2_pp2_ep4_spTrue_cp1}
ADAPTER=${ADAPTER:-$WORKSPACE/results/gpt_oss_${MODEL}_lora_tp2_pp2_ep4_spTrue_cp1}
TP=${TP:-2} # any layout will do, whatever the training's was
PP=${PP:-2}
EP=${EP:-2}
read -ra OPTIONS <<<"${OPTIONS:-}" # any more of generate: --chat --temperature 0.7 ...

run=()
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run=(srun --cpu-bind=none ${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"}
        ${CONTAINER_MOUNTS:+--container-mounts="$CONTAINER_MOUNTS"})
fi

status=0
generate() { # WHAT OPTION...: as many ranks as the layout needs
    echo "== $1"
    ${run[@]+"${run[@]}"} gptoss-convert launch local -- generate "${@:2}" --prompt "$PROMPT" \
        --max-new-tokens "$MAX_NEW_TOKENS" --tp "$TP" --pp "$PP" --ep "$EP" \
        ${OPTIONS[@]+"${OPTIONS[@]}"} || status=$?
}

if [[ $HF_MODEL != none ]]; then generate "Hugging Face: $HF_MODEL" --hf-model "$HF_MODEL"; fi
if [[ -d $MEGATRON_MODEL_PATH ]]; then
    generate "imported: $MEGATRON_MODEL_PATH" --megatron-path "$MEGATRON_MODEL_PATH"
fi
if [[ -d $HF_EXPORT_PATH ]]; then generate "exported: $HF_EXPORT_PATH" --hf-model "$HF_EXPORT_PATH"; fi
if [[ -d $SFT_CHECKPOINT ]]; then
    generate "fine-tuned: $SFT_CHECKPOINT" --megatron-path "$SFT_CHECKPOINT"
fi
if [[ -d $ADAPTER && -d $MEGATRON_MODEL_PATH ]]; then
    generate "adapter: $ADAPTER" --megatron-path "$MEGATRON_MODEL_PATH" --adapter "$ADAPTER"
fi
exit "$status"
