"""``gptoss-convert chat``: a conversation, turn by turn."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.program import choice_of, layout_of, registry_of
from gptoss_plugins.infer.options import (
    chat_options,
    model_options,
    sampling_of,
    sampling_options,
    wanted_of,
)
from gptoss_plugins.infer.speaking import Harmony

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.infer.sampling import Sampling
    from gptoss_plugins.infer.session import Session
    from gptoss_plugins.infer.transcript import Transcript

NEW_TOKENS = 2048
_CUT_SHORT = {
    "length": "--max-new-tokens",
    "context": "the model takes no more",
    "text": "Ctrl-C",
}


@click.command("chat")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append every message to this file, as a line of JSON.",
)
@sampling_options
@chat_options
@model_options
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    save: Path | None,
    max_new_tokens: int | None,
    reasoning: str,
    system: str | None,
    device: str | None,
    torch_dtype: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Talk with any checkpoint's model; an empty line or Ctrl-D ends it.

    Ctrl-C ends an answer. What is typed is the user's turn. The model's analysis is dimmed, its final answer plain. From a
    pipe, every line is a turn.
    """
    from gptoss_plugins.infer.session import open_session
    from gptoss_plugins.infer.transcript import Transcript

    if as_json:
        raise click.UsageError("--json: a conversation is kept with --save; say that")
    sampling = sampling_of(rest)
    with contextlib.ExitStack() as stack:
        transcript = stack.enter_context(Transcript(save)) if save else None
        session = stack.enter_context(
            open_session(
                wanted_of(rest),
                registry_of(ctx),
                choice_of(**rest),
                layout_of(**rest),
                device=device,
                dtype=torch_dtype,
                show=True,
            )
        )
        _talk(
            session,
            transcript if session.rank == 0 else None,
            sampling,
            new_tokens=max_new_tokens or NEW_TOKENS,
            reasoning=reasoning,
            system=system,
        )


def _talk(
    session: Session,
    transcript: Transcript | None,
    sampling: Sampling,
    *,
    new_tokens: int,
    reasoning: str,
    system: str | None,
) -> None:
    from gptoss_plugins.infer.conversation import Conversation
    from gptoss_plugins.infer.harmony import stop_ids

    conversation = Conversation(session.tokenizer, reasoning, system)
    session.engine.stop_ids = frozenset(stop_ids(session.tokenizer))
    if system and transcript:
        transcript.add("system", system)
    for said in _turns(session):
        conversation.add_user(said)
        try:
            asked = conversation.prompt_ids()
            session.require_known([asked])
            session.engine.check([asked])
        except UsageError as error:  # this turn's fault, and the conversation goes on
            conversation.messages.pop()
            if session.rank == 0:
                click.echo(f"error: {error}", err=True)
            continue
        if transcript:
            transcript.add("user", said)
        speaker = Harmony(session.tokenizer, (), show=session.rank == 0)
        with _Interrupt(session) as interrupt:
            (done,), _ = session.engine.generate(
                [asked],
                new_tokens=new_tokens,
                sampling=sampling,
                watch=lambda _, token, s=speaker, i=interrupt: s.push(token) or i.came,  # type: ignore[misc]
            )
        speaker.finish()
        for message in conversation.add_completion(done.ids):
            if transcript:
                transcript.add_message(message)
        if done.reason != "stop" and session.rank == 0:
            click.echo(f"(cut short: {_CUT_SHORT[done.reason]})", err=True)


class _Interrupt:
    """Ctrl-C while the model talks ends what it says, and not the conversation. With several ranks,
    which may hear of it at different tokens, it ends both.
    """

    def __init__(self, session: Session) -> None:
        import torch.distributed as dist

        self.came = False
        self._listens = dist.get_world_size() == 1

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.came = True


def _turns(session: Session) -> Iterator[str]:
    """What the user says, on all ranks; read by the first."""
    while (said := session.shared(_read() if session.rank == 0 else None)) is not None:
        yield said


def _read() -> str | None:
    """One turn; None at the end."""
    if sys.stdin.isatty():
        try:
            said = input(click.style("> ", bold=True))
        except EOFError:
            click.echo()
            return None
        return said.strip() or None
    for line in sys.stdin:
        if line.strip():
            return line.strip()
    return None
