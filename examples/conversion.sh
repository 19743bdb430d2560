#!/usr/bin/env bash
# Hugging Face -> Megatron, back again, and through the live, parallel model. No GPU is needed.
#
#   examples/conversion.sh                        # on this machine
#   sbatch --nodes=2 examples/conversion.sh       # its files shared out among the nodes
#
# README.md has all variables. Submitted again, it goes on where it was.
#SBATCH --job-name=gpt-oss-conversion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

WORKSPACE=${WORKSPACE:-/workspace}
MODEL=${MODEL:-20b}
HF_MODEL=${HF_MODEL:-openai/gpt-oss-$MODEL} # a hub id or a folder
MEGATRON_PATH=${MEGATRON_PATH:-$WORKSPACE/models/gpt-oss-$MODEL}
HF_EXPORT_PATH=${HF_EXPORT_PATH:-$MEGATRON_PATH-hf-export}
EXPORT_DTYPE=${EXPORT_DTYPE:-bf16} # or mxfp4, as OpenAI publishes it
TP=${TP:-2}                        # of the round trip through the live model
PP=${PP:-2}
ROUNDTRIP=${ROUNDTRIP:-yes} # no to leave it out: it takes megatron-core, and the model in memory

everywhere=() once=()
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    everywhere=(srun ${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"}
        ${CONTAINER_MOUNTS:+--container-mounts="$CONTAINER_MOUNTS"})
    once=("${everywhere[@]}" --nodes=1 --ntasks=1 --cpu-bind=none)
fi
everywhere+=(gptoss-convert) once+=(gptoss-convert)

if [[ ! -d $MEGATRON_PATH ]]; then
    "${everywhere[@]}" import --hf-model "$HF_MODEL" --megatron-path "$MEGATRON_PATH"
fi
if [[ ! -d $HF_EXPORT_PATH ]]; then
    "${everywhere[@]}" export --megatron-path "$MEGATRON_PATH" --hf-path "$HF_EXPORT_PATH" \
        --export-dtype "$EXPORT_DTYPE"
fi
"${once[@]}" verify "$MEGATRON_PATH" "$HF_EXPORT_PATH"
if [[ $ROUNDTRIP == yes ]]; then
    "${once[@]}" launch local -- roundtrip --hf-model "$HF_MODEL" --megatron-path "$MEGATRON_PATH" \
        --tp "$TP" --pp "$PP"
fi
