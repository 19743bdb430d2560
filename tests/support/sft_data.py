"""Samples written as strings, what is learned in «these», and a tokenizer with a token per byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gptoss_plugins.data.byte_level import byte_level_files
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.samples import encode, pieces_in
from gptoss_plugins.infer.tokenizer import Tokenizer, load_tokenizer


def byte_tokenizer(folder: Path) -> Tokenizer:
    for name, data in byte_level_files().items():
        (folder / name).write_bytes(data)
    return load_tokenizer({path.name: path for path in folder.iterdir()}, "bytes")


def shown(record: dict[str, Any], form: Form, tokenizer: Tokenizer) -> list[str]:
    """The samples of a record, special tokens spelled out, what is learned in «these»."""
    names = {number: word for word, number in tokenizer._ids.items()}
    texts = []
    for sample in encode([*pieces_in(record, form, tokenizer)], tokenizer):
        text, before = b"", False
        for token, learned in zip(sample.ids.tolist(), sample.learned.tolist(), strict=True):
            text += ("»" if before else "«").encode() * (learned != before)
            text += names[token].encode() if token in names else tokenizer.token_bytes(token)
            before = learned
        texts.append((text + "»".encode() * before).decode())
    return texts


def read(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The other way round, by the tokenizer alone: ids, and which are learned."""
    ids, learned = [], []
    for part in re.split("(«[^»]*»)", text):
        new = tokenizer.encode(part.strip("«»"))
        ids += new
        learned += [part.startswith("«")] * len(new)
    return ids, learned


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
