"""``checkpoint`` and ``logger``: what a run starts from, and what it leaves."""

from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Keep, Positive

_RUN = "nemo_experiments/default"  # where Megatron-Bridge's recipes put a run, below the folder


@dataclass(frozen=True)
class CheckpointConfig:
    """Where training starts, and what is saved when.

    Attributes:
        save: folder for checkpoints; null to save none.
        load: folder to go on from, if it holds a checkpoint: the same run, with all its state.
        pretrained_checkpoint: weights to start from where there is nothing to go on from: a Megatron
            checkpoint, a Hugging Face folder or a hub id. null starts from random weights.
        ckpt_step: go on from this step's checkpoint; null for the newest.
        save_interval: steps between two checkpoints; the last step is always saved.
        most_recent_k: checkpoints to keep, older ones are removed; -1 keeps all.
        save_optim: save the optimizer's and scheduler's state.
        save_rng: changes nothing: a step's random numbers come of rng.seed and its number, so a run
            that goes on has them anyway.
        load_optim: go on with that of the optimizer and scheduler.
        load_rng: likewise.
        finetune: take the weights of ``load`` only, and begin at step 0.
        ckpt_format: of checkpoints.
        fully_parallel_save: data-parallel ranks each write a part of what they all hold; else the
            first of them writes it.

    """

    save: str | None = f"{_RUN}/checkpoints"
    load: str | None = f"{_RUN}/checkpoints"
    pretrained_checkpoint: str | None = None
    ckpt_step: Positive | None = None
    save_interval: Positive = 500
    most_recent_k: Keep = -1
    save_optim: bool = True
    save_rng: bool = True
    load_optim: bool = True
    load_rng: bool = True
    finetune: bool = False
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    fully_parallel_save: bool = True


@dataclass(frozen=True)
class LoggerConfig:
    """What is told, and to whom.

    Attributes:
        log_interval: steps between two lines.
        log_file: file for the lines as JSON, one object each; null for none.
        tensorboard_dir: folder for TensorBoard; null for none.
        wandb_project: project at Weights & Biases; null for none.
        wandb_entity: its owner.
        wandb_exp_name: name of the run there.
        wandb_save_dir: folder for its files.

    """

    log_interval: Positive = 10
    log_file: str | None = None
    tensorboard_dir: str | None = f"{_RUN}/tb_logs"
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_exp_name: str | None = None
    wandb_save_dir: str | None = None
