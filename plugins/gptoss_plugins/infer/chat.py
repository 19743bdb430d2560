"""``gptoss-convert chat``: a conversation, turn by turn."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.program import choice_of, layout_of, registry_of
from gptoss_plugins.infer.channels import Channels
from gptoss_plugins.infer.options import (
    chat_options,
    model_options,
    sampling_of,
    sampling_options,
    wanted_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptoss_plugins.infer.sampling import Sampling
    from gptoss_plugins.infer.session import Session
    from gptoss_plugins.infer.transcript import Transcript

NEW_TOKENS = 2048
_LONGEST = 1 << 20  # bytes of what a user says at once


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

    What is typed is the user's turn. The model's analysis is dimmed, its final answer plain. From a
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
        asked = conversation.prompt_ids()
        session.require_known([asked])
        if transcript:
            transcript.add("user", said)
        channels = Channels(session.tokenizer, show=session.rank == 0)

        def watch(_: int, token: int, channels: Channels = channels) -> bool:
            channels.push(token)
            return False

        (done,), _ = session.engine.generate(
            [asked], new_tokens=new_tokens, sampling=sampling, watch=watch
        )
        channels.finish()
        for message in conversation.add_completion(done.ids):
            if transcript:
                transcript.add_message(message)
        if done.reason in ("length", "context") and session.rank == 0:
            why = "--max-new-tokens" if done.reason == "length" else "the model's context is full"
            click.echo(f"(cut short: {why})", err=True)


def _turns(session: Session) -> Iterator[str]:
    """What the user says, on all ranks; read by the first."""
    while (said := _shared(session, _read() if session.rank == 0 else None)) is not None:
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


def _shared(session: Session, said: str | None) -> str | None:
    """The first rank's text, on all of them."""
    import torch
    import torch.distributed as dist

    data = b"" if said is None else said.encode("utf-8", "surrogateescape")
    if len(data) > _LONGEST:
        raise UsageError(f"a turn of {len(data)} bytes is too long; say it in less than {_LONGEST}")
    if dist.get_world_size() == 1:
        return said
    size = torch.tensor([len(data) if said is not None else -1], device=session.place)
    dist.broadcast(size, 0)
    if size.item() < 0:
        return None
    room = torch.zeros(int(size.item()), dtype=torch.uint8, device=session.place)
    if session.rank == 0:
        room.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(room, 0)
    return bytes(room.cpu().numpy()).decode("utf-8", "surrogateescape")
