#!/usr/bin/env bash
# Packs a data set for slurm_sft.sh and slurm_peft.sh, on one node and no GPU. They find it by its name.
#
#   sbatch examples/pack_data_job.sh
#   DATASET_NAME=openmathinstruct2_thinking sbatch --cpus-per-task=32 examples/pack_data_job.sh
#   DATASET_NAME=mine INPUT=chats.jsonl FORM=chat sbatch examples/pack_data_job.sh
#
# README.md has all variables. Submitted again, it goes on where it was.
#SBATCH --job-name=gpt-oss-pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -uo pipefail

: "${SLURM_JOB_ID:?is set in a job; submit this: sbatch examples/pack_data_job.sh}"
WORKSPACE=$(realpath -ms "${WORKSPACE:-/workspace}")
MODEL=${MODEL:-20b} # whose tokenizer it is
DATASET_NAME=${DATASET_NAME:-squad}
INPUT=${INPUT:-} # JSONL or Parquet of one's own; left out, it is fetched from the hub
PRETRAINED_CHECKPOINT=${PRETRAINED_CHECKPOINT:-$WORKSPACE/models/gpt-oss-$MODEL}
PAD_TO_MULTIPLE=${PAD_TO_MULTIPLE:-1} # twice the context-parallel ranks, if there are several
read -rd '' -a OPTIONS <<<"${OPTIONS:-}" # any more of data pack: --prompt-key question ...

preset=() length=2048
case $DATASET_NAME in
    squad)
        repository=rajpurkar/squad pattern='plain_text/train-*'
        preset=(--preset squad)
        ;;
    openmathinstruct2*)
        repository=nvidia/OpenMathInstruct-2 pattern='data/train_1M-*' length=4096
        preset=(--preset openmathinstruct2_thinking --form chat)
        ;;
    *)
        : "${INPUT:?names the records of $DATASET_NAME; set it, or DATASET_NAME=squad}"
        preset=(--form "${FORM:-prompt_completion}")
        ;;
esac
SEQ_LENGTH=${SEQ_LENGTH:-$length}

node() { # COMMAND...: in the container, if there is one
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        ${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"
            --container-mounts="${CONTAINER_MOUNTS:-$WORKSPACE:$WORKSPACE}"} "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # signals interrupt it
    wait "$step"
}

pack() {
    node mkdir -p "$WORKSPACE/data" || return
    if [[ -z $INPUT ]]; then
        INPUT=$WORKSPACE/data/$DATASET_NAME
        node hf download --repo-type dataset "$repository" --include "$pattern" \
            --local-dir "$INPUT" || return
    fi
    local tokenizer=(--megatron-path "$PRETRAINED_CHECKPOINT")
    if [[ $MODEL == tiny ]]; then tokenizer=(--byte-level); fi
    local name=${DATASET_NAME//[^A-Za-z0-9]/_}_${SEQ_LENGTH}_pad${PAD_TO_MULTIPLE}
    node gptoss-convert data pack --input "$INPUT" --output "$WORKSPACE/data/$name.parquet" \
        --sequence-length "$SEQ_LENGTH" --pad-to-multiple "$PAD_TO_MULTIPLE" \
        "${preset[@]}" "${tokenizer[@]}" ${OPTIONS[@]+"${OPTIONS[@]}"}
}

ahead=''
trap 'ahead=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # the time limit is near
trap : TERM                                                  # scancel or preemption
pack
status=$?
# Slurm takes a preempted job that ends by itself for a finished one.
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
if ((status)) && { [[ $ahead ]] || preempted; }; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
