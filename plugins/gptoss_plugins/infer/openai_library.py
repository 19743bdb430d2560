"""Prompts by OpenAI's own renderer, openai_harmony, for checkpoints without a chat template.

The library brings no vocabulary and would fetch it. It is the checkpoint's own: OpenAI's file has a
line per token, its bytes in base64 and its rank, which is its id in ``tokenizer.json``. Rebuilt from
there it is the same to the byte, or the checkpoint has another vocabulary and is refused; a copy kept
in a cache would not tell. It takes a second.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import tempfile
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.infer.bytelevel import bytes_of
from gptoss_plugins.infer.completion import MARKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gptoss_plugins.infer.tokenizer import Tokenizer

FILE = "o200k_base.tiktoken"
FOLDER = "TIKTOKEN_ENCODINGS_BASE"  # the variable by which openai_harmony finds it
# What openai_harmony requires of it (src/tiktoken_ext/public_encodings.rs).
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def render_by_library(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, reasoning: str
) -> list[int]:
    """As :func:`gptoss_plugins.infer.harmony.render` has it.

    The published template ends instructions with an empty line; this, and OpenAI's description of
    the format, do not. Nothing else is different.
    """
    library = importlib.import_module("openai_harmony")
    encoding = encoding_of(tokenizer)
    conversation = library.Conversation.from_messages(
        [
            library.Message.from_dict(message)
            for message in [_system(library, reasoning), *_messages(messages)]
        ]
    )
    # It would leave out the analysis before the first answer only; _messages has left out all.
    ids: list[int] = encoding.render_conversation_for_completion(
        conversation,
        library.Role.ASSISTANT,
        config=library.RenderConversationConfig(auto_drop_analysis=False),
    )
    return ids


def vocabulary_file(tokenizer: Tokenizer) -> bytes:
    """OpenAI's file of the vocabulary: a line per token, by rank."""
    ranks = sorted(tokenizer.vocabulary().items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(bytes_of(piece)), rank) for piece, rank in ranks)


@cache
def encoding_of(tokenizer: Tokenizer) -> Any:
    """The library's encoding, with the vocabulary of a checkpoint.

    Raises:
        CheckpointError: that is not GPT-OSS's.

    """
    library = importlib.import_module("openai_harmony")
    remedy = "put its own chat_template.jinja beside its tokenizer.json"
    data = vocabulary_file(tokenizer)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise CheckpointError(
            f"{tokenizer.where}: has no chat template, and a vocabulary other than GPT-OSS's, which "
            f"openai-harmony needs; {remedy}"
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(data)
        before = os.environ.get(FOLDER)
        os.environ[FOLDER] = folder
        try:
            encoding = library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            os.environ.pop(FOLDER)
            if before is not None:
                os.environ[FOLDER] = before
    for mark in MARKS:
        if encoding.encode(mark, allowed_special="all") != [tokenizer.id_of(mark)]:
            raise CheckpointError(
                f"{tokenizer.where}: has no chat template, and {mark} at another id than GPT-OSS; "
                f"{remedy}"
            )
    return encoding


def _system(library: Any, reasoning: str) -> dict[str, Any]:
    content = (
        library.SystemContent.new()
        .with_reasoning_effort(library.ReasoningEffort[reasoning.upper()])
        .with_conversation_start_date(datetime.now().strftime("%Y-%m-%d"))
    )
    return {"role": "system", "content": [content.to_dict()]}


def _messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """As the template has them: thinking only before calls that no answer has followed yet."""
    for number, message in enumerate(messages):
        role, content = message["role"], message.get("content", "")
        calls = message.get("tool_calls")
        if role in ("system", "developer"):
            if content:
                instructions = {"type": "developer_content", "instructions": content}
                yield {"role": "developer", "content": [instructions]}
        elif role == "assistant" and calls:
            later = messages[number + 1 :]
            answered = any(m["role"] == "assistant" and not m.get("tool_calls") for m in later)
            if (thinking := message.get("thinking") or content) and not answered:
                yield {"role": role, "channel": "analysis", "content": thinking}
            call = calls[0].get("function", calls[0])
            yield {
                "role": role,
                "channel": "commentary",
                "recipient": f"functions.{call['name']}",
                "content_type": call.get("content_type", "json"),
                "content": json.dumps(call["arguments"], ensure_ascii=False),
            }
        elif role == "assistant":
            yield {"role": role, "channel": "final", "content": content}
        else:
            yield {"role": role, "content": content}
