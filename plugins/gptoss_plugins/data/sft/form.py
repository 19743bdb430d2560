"""What records look like, and what of them is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gptoss_convert.errors import UsageError
from gptoss_plugins.data.sft.presets import PRESETS
from gptoss_plugins.data.sft.records import BadRecordError
from gptoss_plugins.data.sft.system import is_date
from gptoss_plugins.infer.completion import ANALYSIS, COMMENTARY, FINAL

if TYPE_CHECKING:
    from collections.abc import Mapping

CHANNELS = (ANALYSIS, COMMENTARY, FINAL)


@dataclass(frozen=True)
class Form:
    """All that decides what samples are made of records, the tokenizer apart.

    Attributes:
        form: prompt_completion or chat.
        prompt_key, completion_key, messages_key: fields of a record.
        loss_channels: of chat: channels that are learned.
        other_channels: of chat: whether the other ones are read or dropped.
        reasoning_effort, conversation_date: of chat: for the system message.
        preset: a name of ``PRESETS``, whose records are turned into this form first.

    """

    form: Literal["prompt_completion", "chat"] = "prompt_completion"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    messages_key: str = "messages"
    loss_channels: tuple[str, ...] = CHANNELS
    other_channels: Literal["read", "drop"] = "read"
    reasoning_effort: str = "medium"
    conversation_date: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.conversation_date is not None and not is_date(self.conversation_date):
            raise UsageError(
                f"the conversation date {self.conversation_date!r} is no date; write it as 2025-08-05"
            )

    @property
    def dropped_channels(self) -> tuple[str, ...]:
        """Channels that no sample has."""
        if self.other_channels == "read":
            return ()
        return tuple(channel for channel in CHANNELS if channel not in self.loss_channels)

    def adapted(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the fields that the keys name.

        Raises:
            BadRecordError: it is none of the preset's.

        """
        if self.preset is None:
            return record
        try:
            made = PRESETS[self.preset].adapt(record)
        except BadRecordError as error:
            what = str(error).partition(";")[0]
            raise BadRecordError(f"{what}; is it of {self.preset}?") from None
        if self.form == "chat":
            return {self.messages_key: made.messages}
        return {self.prompt_key: made.prompt, self.completion_key: made.completion}
