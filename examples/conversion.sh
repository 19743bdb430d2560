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
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -uo pipefail

WORKSPACE=$(realpath -ms "${WORKSPACE:-/workspace}")
MODEL=${MODEL:-20b}
HF_MODEL=${HF_MODEL:-openai/gpt-oss-$MODEL} # a hub id or a folder
MEGATRON_PATH=${MEGATRON_PATH:-$WORKSPACE/models/gpt-oss-$MODEL}
HF_EXPORT_PATH=${HF_EXPORT_PATH:-$MEGATRON_PATH-hf-export}
EXPORT_DTYPE=${EXPORT_DTYPE:-bf16} # or mxfp4, as OpenAI publishes it
TP=${TP:-2}                        # of the round trip through the live model
PP=${PP:-2}
ROUNDTRIP=${ROUNDTRIP:-yes} # no to leave it out: it takes megatron-core, and the model in memory

job=${SLURM_JOB_ID:-}
container=(${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"
    --container-mounts="${CONTAINER_MOUNTS:-$WORKSPACE:$WORKSPACE}"})
ahead='' told=''
if [[ $job ]]; then
    trap 'ahead=yes; scancel --signal=TERM "$job"' USR1 # the time limit is near
    trap 'told=yes' TERM                                # scancel or preemption
fi

run() { # [OPTION OF SRUN...] COMMAND...: in the job, if there is one; here, if not
    if [[ ! $job ]]; then
        while [[ $1 == --* ]]; do shift; done
        "$@"
        return
    fi
    srun ${container[@]+"${container[@]}"} "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # signals interrupt it
    wait "$step"
}
once() { run --nodes=1 --ntasks=1 --cpu-bind=none "$@"; }
# shellcheck disable=SC2016 # that shell is to see $1, where the container does
is_there() { [[ $(once sh -c 'if [ -d "$1" ]; then echo yes; fi' sh "$1") ]]; }

convert() {
    is_there "$MEGATRON_PATH" || run gptoss-convert import --hf-model "$HF_MODEL" \
        --megatron-path "$MEGATRON_PATH" || return
    is_there "$HF_EXPORT_PATH" || run gptoss-convert export --megatron-path "$MEGATRON_PATH" \
        --hf-path "$HF_EXPORT_PATH" --export-dtype "$EXPORT_DTYPE" || return
    once gptoss-convert verify "$MEGATRON_PATH" "$HF_EXPORT_PATH" || return
    if [[ $ROUNDTRIP == yes ]]; then
        once gptoss-convert launch local -- roundtrip --hf-model "$HF_MODEL" \
            --megatron-path "$MEGATRON_PATH" --tp "$TP" --pp "$PP"
    fi
}

convert
status=$?
# Slurm takes a preempted job that ends by itself for a finished one.
lost() { # whether a node is gone; a job that goes on failing is not its fault
    ((${SLURM_RESTART_COUNT:-0} < 10)) &&
        ! timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" true
}
preempted() { scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }
if [[ $job ]] && ((status)) && { [[ $ahead ]] || preempted || { [[ ! $told ]] && lost; }; }; then
    scontrol requeue "$job"
fi
exit "$status"
