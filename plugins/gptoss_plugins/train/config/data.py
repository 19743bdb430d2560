"""``dataset`` and ``tokenizer``: what the model reads. What kind of data it is, the recipe says."""

from dataclasses import dataclass
from typing import Literal

from gptoss_plugins.train.config.kinds import Blend, Fraction, Natural, Positive


@dataclass(frozen=True)
class PretrainDataset:
    """Running text: megatron-core's indexed files, blended.

    Attributes:
        kind: says which of the two this is.
        sequence_length: tokens of a sample; the same as ``model.seq_length``.
        blend: prefixes of ``.bin``/``.idx`` files and their weights, ``[[a,b],[0.3,0.7]]``; null for
            weights by size; a plain list of prefixes, or one, will do. null as a whole: random tokens.
        split: weights of training, validation and test data.
        path_to_cache: folder for the indices; null for one beside the data.
        random_seed: of the order.
        num_workers: processes that read, per rank; 0 reads in the training process.

    """

    kind: Literal["pretrain"] = "pretrain"
    sequence_length: Positive = 4096
    blend: Blend | None = None
    split: str = "9999,8,2"
    path_to_cache: str | None = None
    random_seed: Natural = 1234
    num_workers: Natural = 8


@dataclass(frozen=True)
class SftDataset:
    """Questions and answers, of which the answers are learned.

    Attributes:
        kind: says which of the two this is.
        sequence_length: tokens of a sample or, packed, of a pack; the same as ``model.seq_length``.
        dataset_name: squad, openmathinstruct2_thinking, or a name or folder for ``datasets``.
        dataset_subset: of a name that has several, such as main of openai/gsm8k.
        dataset_split: of ``dataset_name``; null for train, or what a preset takes.
        dataset_root: folder with ``training.jsonl`` and perhaps ``validation.jsonl``, or with
            ``.parquet`` files of these names, packed or not; or one file. Goes before
            ``dataset_name``.
        form: prompt_completion has a prompt and its completion; chat has messages, which are
            written as harmony.
        prompt_key: field with the prompt.
        completion_key: field with the completion.
        messages_key: field with the messages.
        loss_channels: of chat: the answer's channels that are learned.
        other_channels: of chat: the answer's other channels are read as context, or dropped.
        reasoning_effort: of chat: what the system message says it is.
        conversation_date: of chat: what the system message says it is, as 2025-08-05; null for none.
        val_proportion: part of the samples that is kept for validation where there is no file of
            them.
        max_train_samples: use no more than so many, of a packed file packs; null for all.
        packing: put whole samples together up to ``sequence_length``, before training starts.
        pad_seq_to_mult: pad each packed sample to a multiple of so many tokens; with CP a multiple
            of twice its size.
        path_to_cache: folder for packed data; null for one beside the data.
        random_seed: of the order and the validation part.
        num_workers: processes that read, per rank; 0 reads in the training process.

    """

    kind: Literal["sft"] = "sft"
    sequence_length: Positive = 2048
    dataset_name: str | None = "squad"
    dataset_subset: str | None = None
    dataset_split: str | None = None
    dataset_root: str | None = None
    form: Literal["prompt_completion", "chat"] = "prompt_completion"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    messages_key: str = "messages"
    loss_channels: tuple[Literal["analysis", "commentary", "final"], ...] = (
        "analysis",
        "commentary",
        "final",
    )
    other_channels: Literal["read", "drop"] = "read"
    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    conversation_date: str | None = None
    val_proportion: Fraction = 0.1
    max_train_samples: Positive | None = None
    packing: bool = True
    pad_seq_to_mult: Positive = 1
    path_to_cache: str | None = None
    random_seed: Natural = 5678
    num_workers: Natural = 8


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to tokens.

    Attributes:
        tokenizer_type: HuggingFaceTokenizer reads ``tokenizer.json``; NullTokenizer takes numbers for
            tokens, which is all that prepared or random data needs; ByteLevelTokenizer has a token
            per byte.
        tokenizer_model: folder or hub id of a HuggingFaceTokenizer.
        vocab_size: of a NullTokenizer: how many tokens it has, the end of a document apart.

    """

    tokenizer_type: Literal["HuggingFaceTokenizer", "NullTokenizer", "ByteLevelTokenizer"] = (
        "HuggingFaceTokenizer"
    )
    tokenizer_model: str | None = None
    vocab_size: Positive | None = None
