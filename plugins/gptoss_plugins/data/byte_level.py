"""A tokenizer with a token per byte, as the files of one: for small models, and to try things out."""

from __future__ import annotations

import json

from gptoss_plugins.infer.bytelevel import BYTES

SPECIAL = (
    "<|endoftext|>",
    "<|padding|>",
    "<|return|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|call|>",
    *(f"<|reserved_{n}|>" for n in range(265, 272)),
)
SIZE = 256 + len(SPECIAL)
END, PADDING = 256, 257


def byte_level_files() -> dict[str, bytes]:
    """``tokenizer.json`` and what goes with it: name -> bytes."""
    step = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    level = {"type": "ByteLevel", **step}
    added = [
        {
            "id": 256 + number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": dict(BYTES), "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
    }
    stops = {"eos_token_id": [END], "pad_token_id": PADDING}
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "generation_config.json": stops,
    }
    return {name: json.dumps(value).encode() for name, value in files.items()}
