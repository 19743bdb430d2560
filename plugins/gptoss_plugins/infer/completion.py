"""What a model answered, token by token, taken apart into harmony's messages.

A message is ``<|start|>{header}<|message|>{content}<|end|>``; in place of ``<|end|>`` stands
``<|return|>`` after the last one and ``<|call|>`` after a call of a tool. The header is a role, then
``<|channel|>`` and a channel, then for a call ``to={recipient}`` (which may stand with the role, too)
and ``<|constrain|>{type}`` (https://github.com/openai/harmony/blob/main/docs/format.md). The prompt
ends with ``<|start|>assistant``, so an answer begins in the middle of a header.

Nothing a model writes is an error: text outside of any message is taken for the final answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gptoss_plugins.infer.tokenizer import Tokenizer

START, CHANNEL, CONSTRAIN = "<|start|>", "<|channel|>", "<|constrain|>"
MESSAGE, END, RETURN, CALL = "<|message|>", "<|end|>", "<|return|>", "<|call|>"
ENDS = (END, RETURN, CALL, "<|endoftext|>")
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
ROLES = ("system", "developer", "user", "assistant")
ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
# After the role: what may become a recipient and a type, as far as it has come.
_HEADER = re.compile(r"\s*(t|to|to=\S*(\s+\S*\s*)?)?")


class Delta(NamedTuple):
    """Text as it comes.

    Attributes:
        channel: analysis, commentary, final, or what else the model named.
        text: what to print.
        opens: whether a message begins here.

    """

    channel: str
    text: str
    opens: bool


@dataclass(frozen=True)
class Message:
    """One message of an answer.

    Attributes:
        role: assistant, but for a model that plays others, too; of a tool, its name.
        channel: analysis, commentary or final; final, if the model named none.
        content: the text.
        recipient: the tool it calls, such as ``functions.weather``.
        content_type: of a call, such as ``json``.
        ended_by: the token that ended it; None, if the answer was cut short or the next one began.
        ids: how many token ids it took, special ones included.

    """

    role: str
    channel: str
    content: str
    recipient: str | None = None
    content_type: str | None = None
    ended_by: str | None = None
    ids: int = 0


class Parser:
    """Token ids of an answer in, text by channel out, messages in the end.

    Attributes:
        messages: those that are complete; all of them after :meth:`finish`.

    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._marks = {tokenizer.id_of(mark): mark for mark in MARKS}
        self._ids = 0
        self._begin("assistant")

    def feed(self, token: int) -> list[Delta]:
        """What one more token adds: mostly one piece of text, or none."""
        self._ids += 1
        mark = self._marks.get(token)
        if mark in ENDS:
            return self._close(mark)
        if mark == START:
            return self._next("")
        if mark == CHANNEL and self._message:
            return self._next("assistant" + CHANNEL)
        if self._message:
            return self._say(self._stream.push(token))
        if mark == MESSAGE:
            self._open(*_read(self._header))
        elif mark:
            self._header += mark
        else:
            self._header += self._stream.push(token)
            if self._is_text():
                return self._say(self._header_text())
        return []

    def finish(self) -> list[Delta]:
        """The answer ends here, whether its last message is complete or not."""
        return self._close(None)

    def _begin(self, header: str) -> None:
        self._header = header
        self._message: Message | None = None
        self._text: list[str] = []
        self._stream = self._tokenizer.stream()

    def _open(self, role: str, channel: str, recipient: str | None, kind: str | None) -> None:
        self._message = Message(role, channel, "", recipient, kind)
        self._stream = self._tokenizer.stream()

    def _say(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._message is None:
            self._message = Message("assistant", FINAL, "")
        self._text.append(text)
        return [Delta(self._message.channel, text, len(self._text) == 1)]

    def _next(self, header: str) -> list[Delta]:
        """Another message begins, and its first token has been counted already."""
        self._ids -= 1
        said = self._close(None)
        self._ids += 1
        self._begin(header)
        return said

    def _close(self, mark: str | None) -> list[Delta]:
        said = self._say(self._stream.finish() if self._message else self._unopened(mark))
        if message := self._message:
            content = "".join(self._text)
            facts = {**vars(message), "content": content, "ended_by": mark, "ids": self._ids}
            self.messages.append(Message(**facts))
            self._ids = 0
        self._begin("assistant")
        return said

    def _is_text(self) -> bool:
        """A header that can be none any more, as of a model that never learned the format."""
        role, channel, _ = self._header.partition(CHANNEL)
        if channel or CONSTRAIN in role or not role.startswith("assistant"):
            return False
        return not _HEADER.fullmatch(role.removeprefix("assistant"))

    def _unopened(self, mark: str | None) -> str:
        """The text of a message that ends before its ``<|message|>``."""
        before, channel, after = self._header.partition(CHANNEL)
        if not channel:
            text = self._header_text()
            return "" if text.strip() in ("", *ROLES) or text.lstrip().startswith("to=") else text
        if not mark:
            return ""  # a header that was cut short
        name, space, text = after.partition(" ")
        if CONSTRAIN in text or _HEADER.fullmatch(text):
            name, text = name + space + text, ""
        self._open(*_read(before + channel + name))
        return text

    def _header_text(self) -> str:
        return self._header.removeprefix("assistant").replace(CONSTRAIN, "")


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> list[Message]:
    """The messages of a whole answer, however it ended.

    Args:
        ids: what the model gave for a prompt that ends with ``<|start|>assistant``.
        tokenizer: knows the ids of the special tokens.

    """
    parser = Parser(tokenizer)
    for token in ids:
        parser.feed(token)
    parser.finish()
    return parser.messages


def _read(header: str) -> tuple[str, str, str | None, str | None]:
    """Role, channel, recipient and type, as openai_harmony's parser reads a header."""
    before, _, after = header.partition(CHANNEL)
    channel, rest = re.match(r"\s*([^\s<]*)(.*)", after, re.DOTALL).groups()  # type: ignore[union-attr]
    words = re.sub(re.escape(CONSTRAIN) + r"\s*", " " + CONSTRAIN, f"{before} {rest}").split()
    role = words.pop(0) if words and not words[0].startswith(("to=", CONSTRAIN)) else "assistant"
    recipient = kind = None
    if words and (words[-1].startswith(CONSTRAIN) or (len(words) > 1 and words[-1][:3] != "to=")):
        kind = words.pop().removeprefix(CONSTRAIN)
    if words:
        recipient = words.pop().removeprefix("to=")
    return role, channel or (COMMENTARY if recipient else FINAL), recipient, kind
