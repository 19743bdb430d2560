#!/usr/bin/env bash
# Pretraining on Slurm, in several parallel layouts in turn.
#
#   sbatch examples/slurm_pretrain.sh                         # 20B on 4 nodes of 8 GPUs
#   MODEL=120b sbatch --nodes=8 examples/slurm_pretrain.sh
#
# README.md has all variables. Every run goes on from its last checkpoint, whenever this is submitted.
#SBATCH --job-name=gpt-oss-pretrain
#SBATCH --nodes=4
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

: "${SLURM_JOB_ID:?is set in a job; submit this: sbatch examples/slurm_pretrain.sh}"
WORKSPACE=$(realpath -ms "${WORKSPACE:-/workspace}")
MODEL=${MODEL:-20b} # 20b, 120b, or tiny: 270,000 parameters, for CPUs
RECIPE=${RECIPE:-${MODEL}_pretrain}
case $MODEL in # tensor, pipeline, expert, context parallel
    120b) layouts='2,4,16,1' ;;
    tiny) layouts='1,1,1,1' ;;
    *) layouts='2,4,4,1 4,2,4,1 2,4,4,2' ;;
esac
LAYOUTS=${LAYOUTS:-$layouts}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} # none: CPUs
NPROC_PER_NODE=${NPROC_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
TRAIN_ITERS=${TRAIN_ITERS:-1000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-50}
EVAL_ITERS=${EVAL_ITERS:-10}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
LOG_INTERVAL=${LOG_INTERVAL:-1}
TOKENIZER=${TOKENIZER:-openai/gpt-oss-$MODEL} # that the data was made with
read -rd '' -a OVERRIDES <<<"${OVERRIDES:-}"        # any more of the recipe's fields: section.field=value ...

# Data: what DCLM_DATA_DIR and DCLM_CACHE name; without them random tokens.
export CUDA_DEVICE_MAX_CONNECTIONS=1 NCCL_NVLS_ENABLE=0 TORCH_NCCL_AVOID_RECORD_STREAMS=1
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

srun --nodes=1 --ntasks=1 ${container[@]+"${container[@]}"} mkdir -p "$WORKSPACE/results"
status=0
for layout in $LAYOUTS; do
    IFS=, read -r tp pp ep cp _ <<<"$layout,1,1,1" # what is left out is 1
    ((tp > 1)) && sp=True || sp=False
    run=gpt_oss_${MODEL}_pretrain_tp${tp}_pp${pp}_ep${ep}_sp${sp}_cp${cp}
    results=$WORKSPACE/results/$run
    words=(
        "checkpoint.save=$results" "checkpoint.load=$results" "checkpoint.save_interval=$SAVE_INTERVAL"
        "model.tensor_model_parallel_size=$tp" "model.pipeline_model_parallel_size=$pp"
        "model.expert_model_parallel_size=$ep" "model.context_parallel_size=$cp"
        "model.sequence_parallel=$sp"
        "model.seq_length=$SEQ_LENGTH" "dataset.sequence_length=$SEQ_LENGTH"
        "train.train_iters=$TRAIN_ITERS" "train.global_batch_size=$GLOBAL_BATCH_SIZE"
        "train.micro_batch_size=$MICRO_BATCH_SIZE" "train.eval_iters=$EVAL_ITERS"
        "scheduler.lr_warmup_iters=$LR_WARMUP_ITERS"
        "logger.log_interval=$LOG_INTERVAL" "logger.log_file=$results.jsonl"
        "logger.tensorboard_dir=$results/tb_logs"
    )
    if [[ -n ${DCLM_DATA_DIR:-} && $MODEL != tiny ]]; then
        words+=(tokenizer.tokenizer_type=HuggingFaceTokenizer "tokenizer.tokenizer_model=$TOKENIZER")
    fi
    if [[ -n ${WANDB_API_KEY:-} ]]; then
        words+=("logger.wandb_project=${WANDB_PROJECT:-gpt-oss}" "logger.wandb_exp_name=$run")
    fi
    echo "== $run"
    ranks pretrain --recipe "$RECIPE" "${words[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
    code=$?
    if ((code)); then
        echo "$run: exit code $code" >&2
        status=$code
    fi
    if [[ $ahead$told ]]; then break; fi
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
