"""A small tokenizer of GPT-OSS's kind: byte-level, its special tokens by name at ids of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gptoss_plugins.infer.bytelevel import BYTES

WORDS = ("assistant", "analysis", "commentary", "final", "Ġhello", "Ġto", "=functions", "ðŁĺ")
SPECIAL = (
    "<|end|>",
    "<|reserved|>",
    "<|return|>",
    "<|message|>",
    "<|start|>",
    "<|endoftext|>",
    "<|call|>",
    "<|channel|>",
    "<|constrain|>",
)
# Harmony by its description (https://github.com/openai/harmony/blob/main/docs/format.md), in the
# terms of the published template: thinking shows only before calls that are not answered yet.
TEMPLATE = """\
{%- macro message(header, content, end="<|end|>") -%}
{{ "<|start|>" + header + "<|message|>" + content + end }}
{%- endmacro -%}
{{- message("system", "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: \
2024-06\nCurrent date: " + strftime_now("%Y-%m-%d") + "\n\nReasoning: " + reasoning_effort
+ "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.") }}
{%- set answers = namespace(left=0) -%}
{%- for m in messages if m.role == "assistant" and not m.tool_calls -%}
  {%- set answers.left = answers.left + 1 -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role in ["system", "developer"] -%}
    {{- message("developer", "# Instructions\n\n" + m.content) }}
  {%- elif m.role == "user" -%}
    {{- message("user", m.content) }}
  {%- elif m.tool_calls -%}
    {%- if m.thinking and not answers.left -%}
      {{- message("assistant<|channel|>analysis", m.thinking) }}
    {%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- message("assistant to=functions." + call.name + "<|channel|>commentary json",
                call.arguments | tojson, "<|call|>") }}
  {%- else -%}
    {%- set answers.left = answers.left - 1 -%}
    {{- message("assistant<|channel|>final", m.content) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|start|>assistant" }}{%- endif -%}
"""


def tiny_backend(words: tuple[str, ...] = WORDS) -> Backend:
    vocabulary = {character: byte for character, byte in BYTES.items()}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def write_tokenizer(folder: Path, **files: Any) -> dict[str, Path]:
    """Files of a checkpoint; ``None`` leaves one out."""
    folder.mkdir(exist_ok=True)
    named: dict[str, Any] = {
        "tokenizer.json": tiny_backend().to_str(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",  # which this vocabulary lacks
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
        },
        "chat_template.jinja": TEMPLATE,
        **files,
    }
    for name, value in named.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return {path.name: path for path in folder.iterdir()}
