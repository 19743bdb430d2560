"""``gptoss-convert generate``: prompts in, their continuations out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.program import choice_of, echo_json, given, layout_of, registry_of
from gptoss_convert.staging import human
from gptoss_plugins.infer.options import (
    chat_options,
    model_options,
    sampling_of,
    sampling_options,
    wanted_of,
)
from gptoss_plugins.infer.speaking import Harmony, Plain, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_plugins.infer.engine import Completion, Timing
    from gptoss_plugins.infer.session import Session
    from gptoss_plugins.infer.tokenizer import Tokenizer

SCHEMA = "gptoss-convert.generate/1"
MOST_PROMPTS = 64 << 20  # bytes of a file of prompts


@click.command("generate")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="A prompt per line; - for standard input.",
)
@click.option(
    "--stop", "stops", multiple=True, metavar="TEXT", help="Ends the answer (repeatable)."
)
@click.option(
    "--chat", "as_chat", is_flag=True, help="Each prompt is a user's message; harmony in and out."
)
@sampling_options
@chat_options
@model_options
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    prompts: Sequence[str],
    prompt_file: Path | None,
    stops: Sequence[str],
    as_chat: bool,
    max_new_tokens: int | None,
    reasoning: str,
    system: str | None,
    device: str | None,
    torch_dtype: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Continue prompts, with any checkpoint's model.

    Reads --megatron-path or --hf-model straight into the model, spread over the ranks as --tp, --pp
    and --ep say: run it alone, or with python -m torch.distributed.run --nproc_per_node=N. Several
    prompts are one batch.
    """
    from gptoss_plugins.infer.harmony import stop_ids
    from gptoss_plugins.infer.session import open_session

    if not prompts and prompt_file is None:
        raise click.UsageError("Missing option '--prompt' or '--prompt-file'.")
    if "" in stops:
        raise click.UsageError("--stop is empty, and would end every answer at once; leave it out")
    if not as_chat and (said := given(ctx) & {"system", "reasoning"}):
        raise click.UsageError(f"--{min(said)} is for conversations; say --chat, too")
    sampling = sampling_of(rest)
    from_stdin = prompt_file is not None and str(prompt_file) == "-"
    filed = _prompts(prompt_file) if prompt_file and not from_stdin else []
    with open_session(
        wanted_of(rest),
        registry_of(ctx),
        choice_of(**rest),
        layout_of(**rest),
        device=device,
        dtype=torch_dtype,
        show=not as_json,
    ) as session:
        if from_stdin:  # the first rank's; the others hear of it
            read = sys.stdin.read(MOST_PROMPTS) if session.rank == 0 else None
            filed = _lines(session.shared(read) or "", "standard input")
        texts = [*prompts, *filed]
        asked = [
            _asked(text, session.tokenizer, reasoning if as_chat else None, system)
            for text in texts
        ]
        session.require_known(asked)
        if as_chat:
            session.engine.stop_ids = frozenset(stop_ids(session.tokenizer))
        show, kind = session.rank == 0 and not as_json, Harmony if as_chat else Plain
        live = show and len(asked) == 1
        speakers = [kind(session.tokenizer, stops, show=live) for _ in asked]
        done, timing = session.engine.generate(
            asked,
            new_tokens=max_new_tokens or 20,
            sampling=sampling,
            watch=lambda number, token: speakers[number].push(token),
        )
        for speaker in speakers:
            speaker.finish()
        if session.rank:
            return
        if as_json:
            echo_json(_json(session, texts, done, speakers, timing, as_chat=as_chat))
            return
        for number, one in enumerate(done if show and not live else ()):
            click.echo(f"--- {number + 1}: {printable(texts[number])}")
            again = kind(session.tokenizer, stops, show=True)
            for token in one.ids:
                again.push(token)
            again.finish()
        click.echo(_summary(session, done, timing), err=True)


def _prompts(path: Path) -> list[str]:
    """The prompts in a file."""
    from gptoss_convert.untrusted import read_small

    try:
        return _lines(read_small(path, MOST_PROMPTS).decode(), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: is no UTF-8 text at byte {error.start}; write it in UTF-8"
        ) from None


def _lines(text: str, where: str) -> list[str]:
    found = [line for raw in text.split("\n") if (line := raw.removesuffix("\r")).strip()]
    if not found:
        raise UsageError(f"{where}: has no prompt; write one per line")
    return found


def _asked(text: str, tokenizer: Tokenizer, reasoning: str | None, system: str | None) -> list[int]:
    """Token ids of a prompt, or of a conversation that begins with it."""
    if reasoning is None:
        return tokenizer.encode(text)
    from gptoss_plugins.infer.conversation import Conversation

    conversation = Conversation(tokenizer, reasoning, system)
    conversation.add_user(text)
    return conversation.prompt_ids()


def _json(
    session: Session,
    texts: Sequence[str],
    done: Sequence[Completion],
    speakers: Sequence[Plain | Harmony],
    timing: Timing,
    *,
    as_chat: bool,
) -> dict[str, Any]:
    results = []
    for text, one, speaker in zip(texts, done, speakers, strict=True):
        row = {
            "prompt": text,
            "prompt_ids": one.prompt,
            "ids": one.ids,
            "text": speaker.text,
            "reason": one.reason,
        }
        if as_chat:
            row["messages"] = [vars(message) for message in speaker.messages]
        results.append(row)
    return {
        "schema": SCHEMA,
        "results": results,
        "timing": {**asdict(timing), "tokens_per_second": timing.tokens_per_second},
        "device": str(session.place),
        "peak_bytes": session.peak_bytes(),
    }


def _summary(session: Session, done: Sequence[Completion], timing: Timing) -> str:
    reasons = ", ".join(sorted({one.reason for one in done}))
    speed = f"{timing.tokens_per_second:.1f} tokens/s after it" if timing.decoding else ""
    return (
        f"{timing.prompt_tokens} prompt tokens, {timing.new_tokens} new ({reasons}); first token after "
        f"{timing.first_token:.2f} s, {speed or 'no other'}; peak memory {human(session.peak_bytes())}"
    )
