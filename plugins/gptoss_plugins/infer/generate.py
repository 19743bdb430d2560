"""``gptoss-convert generate``: prompts in, their continuations out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.program import choice_of, echo_json, layout_of, registry_of
from gptoss_convert.staging import human
from gptoss_plugins.infer.answer import Answer
from gptoss_plugins.infer.channels import Channels, messages_json, printable
from gptoss_plugins.infer.options import (
    chat_options,
    model_options,
    sampling_of,
    sampling_options,
    wanted_of,
)

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
    from gptoss_plugins.infer.session import open_session

    texts = [*prompts, *(_lines(prompt_file) if prompt_file else ())]
    if not texts:
        raise click.UsageError("Missing option '--prompt' or '--prompt-file'.")
    if system and not as_chat:
        raise click.UsageError("--system is for conversations; say --chat, too")
    sampling = sampling_of(rest)
    with open_session(
        wanted_of(rest),
        registry_of(ctx),
        choice_of(**rest),
        layout_of(**rest),
        device=device,
        dtype=torch_dtype,
        show=not as_json,
    ) as session:
        asked = [
            _asked(text, session.tokenizer, reasoning if as_chat else None, system)
            for text in texts
        ]
        session.require_known(asked)
        if as_chat:
            session.engine.stop_ids = frozenset(_chat_stops(session.tokenizer))
        show = session.rank == 0 and not as_json
        speakers = [
            _Speaker(session.tokenizer, stops, as_chat=as_chat, live=show and len(asked) == 1)
            for _ in asked
        ]
        done, timing = session.engine.generate(
            asked,
            new_tokens=max_new_tokens or 20,
            sampling=sampling,
            watch=lambda number, token: speakers[number].push(token),
        )
        for number, speaker in enumerate(speakers):
            if show and len(asked) > 1:
                click.echo(f"--- {number + 1}: {printable(texts[number])}")
            speaker.finish(show=show)
        if session.rank:
            return
        if as_json:
            echo_json(_json(session, texts, done, speakers, timing, as_chat=as_chat))
        else:
            click.echo(_summary(session, done, timing), err=True)


def _lines(path: Path) -> list[str]:
    """The prompts in a file."""
    if str(path) == "-":
        text = sys.stdin.read(MOST_PROMPTS)
    else:
        from gptoss_convert.untrusted import read_small

        try:
            text = read_small(path, MOST_PROMPTS).decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: is no UTF-8 text at byte {error.start}; write it in UTF-8"
            ) from None
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise UsageError(f"{path}: has no prompt; write one per line")
    return found


def _asked(text: str, tokenizer: Tokenizer, reasoning: str | None, system: str | None) -> list[int]:
    """Token ids of a prompt, or of a conversation that begins with it."""
    if reasoning is None:
        return tokenizer.encode(text)
    from gptoss_plugins.infer.conversation import Conversation

    conversation = Conversation(tokenizer, reasoning, system)
    conversation.add_user(text)
    return conversation.prompt_ids()


def _chat_stops(tokenizer: Tokenizer) -> Sequence[int]:
    from gptoss_plugins.infer.harmony import stop_ids

    return stop_ids(tokenizer)


class _Speaker:
    """One prompt's answer: watched for texts that end it, and shown as it comes if it is alone."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, as_chat: bool, live: bool
    ) -> None:
        self.answer = Answer(tokenizer, stops)
        self._channels = Channels(tokenizer, show=True) if as_chat else None
        self._tokens: list[int] = []
        self._live = live

    def push(self, token: int) -> bool:
        """One more token; whether it ends the answer."""
        added = self.answer.push(token)
        self._tokens.append(token)
        if self._live:
            self._say(added, token)
        return self.answer.has_ended

    def finish(self, *, show: bool) -> None:
        """The answer has ended."""
        rest = self.answer.finish()
        if not show:
            return
        if not self._live:
            for token in self._tokens if self._channels else ():
                self._say("", token)
            rest = self.answer.text
        if self._channels:
            self._channels.finish()
        else:
            click.echo(printable(rest))

    def _say(self, text: str, token: int) -> None:
        if self._channels:
            self._channels.push(token)
        else:
            click.echo(printable(text), nl=False)
            sys.stdout.flush()


def _json(
    session: Session,
    texts: Sequence[str],
    done: Sequence[Completion],
    speakers: Sequence[_Speaker],
    timing: Timing,
    *,
    as_chat: bool,
) -> dict[str, Any]:
    from gptoss_plugins.infer.completion import parse

    results = []
    for text, one, speaker in zip(texts, done, speakers, strict=True):
        row = {
            "prompt": text,
            "prompt_ids": one.prompt,
            "ids": one.ids,
            "text": speaker.answer.text,
            "reason": "text" if one.reason == "watch" else one.reason,
        }
        if as_chat:
            row["messages"] = messages_json(parse(one.ids, session.tokenizer))
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
