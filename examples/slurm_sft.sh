#!/usr/bin/env bash
# Fine-tuning of all weights on Slurm, packed, in several parallel layouts in turn.
#
#   sbatch examples/slurm_sft.sh                              # 20B on 2 nodes of 8 GPUs
#   MODEL=120b sbatch --nodes=4 examples/slurm_sft.sh
#   DATASET_NAME=openmathinstruct2_thinking sbatch examples/slurm_sft.sh
#
# README.md has all variables. Every run goes on from its last checkpoint, whenever this is submitted.
#SBATCH --job-name=gpt-oss-sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -uo pipefail

: "${SLURM_JOB_ID:?is set in a job; submit this: sbatch examples/slurm_sft.sh}"
WORKSPACE=$(realpath -ms "${WORKSPACE:-/workspace}")
MODEL=${MODEL:-20b} # 20b, 120b, or tiny: 270,000 parameters, for CPUs
RECIPE=${RECIPE:-${MODEL}_sft}
case $MODEL in # tensor, pipeline, expert, context parallel
    120b) layouts='1,4,8,1' ;;
    tiny) layouts='1,1,1,1' ;;
    *) layouts='2,2,4,1 4,1,4,1' ;;
esac
LAYOUTS=${LAYOUTS:-$layouts}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} # none: CPUs
NPROC_PER_NODE=${NPROC_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
PRETRAINED_CHECKPOINT=${PRETRAINED_CHECKPOINT:-$WORKSPACE/models/gpt-oss-$MODEL}
DATASET_NAME=${DATASET_NAME:-squad} # squad, openmathinstruct2_thinking, or one of the hub's
DATASET_ROOT=${DATASET_ROOT:-}      # a file or folder of one's own, in place of it
case $DATASET_NAME in
    openmathinstruct2*)
        data=("dataset.dataset_name=openmathinstruct2_thinking" dataset.form=chat dataset.val_proportion=0.05)
        defaults=(4096 128 250 5e-6 5e-7)
        ;;
    *)
        data=("dataset.dataset_name=$DATASET_NAME")
        defaults=(2048 8 50 5e-6 0)
        ;;
esac
SEQ_LENGTH=${SEQ_LENGTH:-${defaults[0]}}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-${defaults[1]}}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-${defaults[2]}}
LR=${LR:-${defaults[3]}}
MIN_LR=${MIN_LR:-${defaults[4]}}
TRAIN_ITERS=${TRAIN_ITERS:-1000}
EVAL_INTERVAL=${EVAL_INTERVAL:-50}
EVAL_ITERS=${EVAL_ITERS:-32}
SAVE_INTERVAL=${SAVE_INTERVAL:-250}
LOG_INTERVAL=${LOG_INTERVAL:-1}
SAVE_SUFFIX=${SAVE_SUFFIX:-}           # of the results' name
read -rd '' -a OVERRIDES <<<"${OVERRIDES:-}" # any more of the recipe's fields: section.field=value ...

# One rank packs the data while the others wait, unless pack_data_job.sh has done it before.
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_AVOID_RECORD_STREAMS=1 TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=7200
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ahead='' told=''
trap 'ahead=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # the time limit is near: save
trap 'told=yes' TERM                                         # scancel or preemption: it saves already

container=(${CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE"
    --container-mounts="${CONTAINER_MOUNTS:-$WORKSPACE:$WORKSPACE}"})

ranks() { # COMMAND...: of gptoss-convert, a launcher on each node
    srun --kill-on-bad-exit=1 --cpu-bind=none ${container[@]+"${container[@]}"} \
        python -m gptoss_plugins.launch.node \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$NPROC_PER_NODE" \
        --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv_backend=c10d \
        --rdzv_endpoint="$first:$((10000 + SLURM_JOB_ID % 20000))" \
        -m gptoss_convert "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # signals interrupt it
    wait "$step"
}

name=${DATASET_NAME//[^A-Za-z0-9]/_}
prefix=gpt_oss_${MODEL}_finetune
if [[ $name != squad ]]; then prefix=gpt_oss_${MODEL}_${name}_finetune; fi
once=(srun --nodes=1 --ntasks=1 ${container[@]+"${container[@]}"})
# shellcheck disable=SC2016 # that shell is to see $1, where the container does
is_there() { [[ $("${once[@]}" sh -c 'if [ -f "$1" ]; then echo yes; fi' sh "$1") ]]; }
"${once[@]}" mkdir -p "$WORKSPACE/results"
status=0
for layout in $LAYOUTS; do
    IFS=, read -r tp pp ep cp _ <<<"$layout,1,1,1" # what is left out is 1
    ((tp > 1)) && sp=True || sp=False
    pad=$((cp > 1 ? 2 * cp : 1))
    run=${prefix}_tp${tp}_pp${pp}_ep${ep}_sp${sp}_cp${cp}${SAVE_SUFFIX}
    results=$WORKSPACE/results/$run
    words=(
        "checkpoint.save=$results" "checkpoint.load=$results" "checkpoint.save_interval=$SAVE_INTERVAL"
        "model.tensor_model_parallel_size=$tp" "model.pipeline_model_parallel_size=$pp"
        "model.expert_model_parallel_size=$ep" "model.context_parallel_size=$cp"
        "model.sequence_parallel=$sp" model.calculate_per_token_loss=true
        "model.seq_length=$SEQ_LENGTH" "dataset.sequence_length=$SEQ_LENGTH"
        "checkpoint.pretrained_checkpoint=$PRETRAINED_CHECKPOINT"
        "tokenizer.tokenizer_model=$PRETRAINED_CHECKPOINT"
        "train.train_iters=$TRAIN_ITERS" "train.global_batch_size=$GLOBAL_BATCH_SIZE"
        "train.eval_interval=$EVAL_INTERVAL" "train.eval_iters=$EVAL_ITERS"
        "scheduler.lr_warmup_iters=$LR_WARMUP_ITERS" "optimizer.lr=$LR" "optimizer.min_lr=$MIN_LR"
        "dataset.pad_seq_to_mult=$pad" "dataset.path_to_cache=$WORKSPACE/data/cache" "${data[@]}"
        "logger.log_interval=$LOG_INTERVAL" "logger.log_file=$results.jsonl"
        "logger.tensorboard_dir=$results/tb_logs"
    )
    packed=$WORKSPACE/data/${name}_${SEQ_LENGTH}_pad${pad}.parquet # by pack_data_job.sh
    if [[ -n $DATASET_ROOT ]]; then
        words+=("dataset.dataset_root=$DATASET_ROOT")
    elif is_there "$packed"; then
        words+=("dataset.dataset_root=$packed")
    fi
    if [[ -n ${WANDB_API_KEY:-} ]]; then
        words+=("logger.wandb_project=${WANDB_PROJECT:-gpt-oss}" "logger.wandb_exp_name=$run")
    fi
    echo "== $run"
    ranks sft --recipe "$RECIPE" "${words[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
    status=$?
    if [[ $status != 0 || $ahead$told ]]; then break; fi
done
# Slurm takes a preempted job that saves and ends for a finished one. And a lost node breaks the ranks'
# connections long before Slurm misses it.
lost() { # whether a node is gone; a job that goes on failing is not its fault
    ((${SLURM_RESTART_COUNT:-0} < 10)) &&
        ! timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" true
}
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
if [[ $ahead ]] || preempted || { ((status)) && [[ ! $told ]] && lost; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
