"""``train``, ``optimizer``, ``scheduler``, ``ddp``, ``rng``: what happens in a step, and how often."""

from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Fraction, Natural, Positive, Rate


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, when to evaluate, when to stop.

    Attributes:
        train_iters: optimizer steps.
        global_batch_size: sequences of a step, over all ranks; of packed data, packs.
        micro_batch_size: sequences that a rank takes at once.
        eval_interval: steps between two evaluations.
        eval_iters: batches of an evaluation; 0 for no evaluation.
        exit_signal_handler: on SIGTERM finish the step, save, and end with exit code 0.
        exit_interval: save and stop at a step that this divides; null for never.
        exit_duration_in_mins: save and stop after so many minutes; null for never.
        manual_gc: collect Python's garbage on all ranks in the same step only.
        manual_gc_interval: steps between two such collections; 0 for none but at evaluations.

    """

    train_iters: Positive = 1000
    global_batch_size: Positive = 128
    micro_batch_size: Positive = 1
    eval_interval: Positive = 2000
    eval_iters: Natural = 32
    exit_signal_handler: bool = True
    exit_interval: Positive | None = None
    exit_duration_in_mins: Positive | None = None
    manual_gc: bool = False
    manual_gc_interval: Natural = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """megatron-core's optimizer.

    Attributes:
        optimizer: adam is AdamW: its weight decay is decoupled from the gradient.
        lr: the highest learning rate.
        min_lr: the learning rate that decay ends at.
        weight_decay: of matrices; biases and norms have none. The scheduler's, if set, rules.
        adam_beta1: decay of the mean of gradients.
        adam_beta2: decay of the mean of their squares.
        adam_eps: added to the root of the latter.
        sgd_momentum: of sgd.
        clip_grad: largest norm of all gradients together; 0 for no clipping.
        use_distributed_optimizer: split the optimizer's state over the data-parallel ranks. With adam,
            master weights take 2 bytes beside a bfloat16 weight, and not 4, and lose nothing.
        exp_avg_dtype: of the mean of gradients; bf16 takes half the memory, with the distributed
            optimizer's adam.
        exp_avg_sq_dtype: of the mean of their squares, likewise.

    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Rate = 3e-4
    min_lr: Rate = 3e-5
    weight_decay: Rate = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Rate = 1e-8
    sgd_momentum: Fraction = 0.9
    clip_grad: Rate = 1.0
    use_distributed_optimizer: bool = True
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class SchedulerConfig:
    """How the learning rate and the weight decay move.

    Attributes:
        lr_decay_style: curve from ``optimizer.lr`` to ``optimizer.min_lr``. WSD stays up, and goes
            down at the end.
        lr_decay_iters: step at which it ends; null for ``train.train_iters``.
        lr_warmup_iters: steps of the straight way up.
        lr_warmup_init: where that way starts.
        lr_wsd_decay_iters: of WSD: steps of the way down.
        lr_wsd_decay_style: of WSD: its curve.
        start_weight_decay: at the first step; null for ``optimizer.weight_decay``.
        end_weight_decay: at the last step; null for ``optimizer.weight_decay``.
        weight_decay_incr_style: curve between the two; constant if they are one.

    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_decay_iters: Positive | None = None
    lr_warmup_iters: Natural = 0
    lr_warmup_init: Rate = 0.0
    lr_wsd_decay_iters: Positive | None = None
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    start_weight_decay: Rate | None = 0.033
    end_weight_decay: Rate | None = 0.033
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(frozen=True)
class DdpConfig:
    """megatron-core's DistributedDataParallel.

    Attributes:
        grad_reduce_in_fp32: gradients are kept and summed in float32.
        overlap_grad_reduce: sum gradients while the backward pass still runs.
        overlap_param_gather: gather weights while the next forward pass already runs.
        average_in_collective: divide before summing; not with ``model.calculate_per_token_loss``.
        check_for_nan_in_grad: stop where a gradient is NaN or infinite.
        bucket_size: gradients that are summed in one go; null for megatron-core's choice.

    """

    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    average_in_collective: bool = False
    check_for_nan_in_grad: bool = True
    bucket_size: Positive | None = None


@dataclass(frozen=True)
class RngConfig:
    """Random numbers.

    Attributes:
        seed: of initial weights, adapters and dropout.

    """

    seed: Natural = 1234
