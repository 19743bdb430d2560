"""``--save``: a conversation on disk, a line of JSON per message, each safe before the next."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from gptoss_convert.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from gptoss_plugins.infer.completion import Message


class Transcript:
    """Appends to a file, and makes it if there is none.

    A line is ``{"role", "channel", "content", "ids", "time"}``: channel null but for the model, ids
    how many tokens the message took, time in UTC; a call of a tool has its ``recipient``, too.

    Raises:
        UsageError: it is not to be written: a folder, no permission, no such folder.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_new = not path.exists()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written: {error.strerror}; name a file in a folder of your own"
            ) from None
        facts = os.fstat(self._fd)
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise UsageError(f"{path}: is no plain file; name another")
        if facts.st_size and os.pread(self._fd, 1, facts.st_size - 1) != b"\n":
            self._write(b"\n")  # after a line that a crash cut short

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(
        self,
        role: str,
        content: str,
        *,
        channel: str | None = None,
        ids: int | None = None,
        recipient: str | None = None,
    ) -> None:
        """One message, on disk when this returns.

        Raises:
            ResourceError: the disk is full, or has failed.

        """
        line: dict[str, Any] = {"role": role, "channel": channel, "content": content, "ids": ids}
        if recipient is not None:
            line["recipient"] = recipient
        line["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        # Bytes of a terminal that are no UTF-8 become \udc..: JSON's way to write them, too.
        self._write(
            (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        )

    def add_message(self, message: Message) -> None:
        """One of an answer's messages."""
        self.add(
            message.role,
            message.content,
            channel=message.channel,
            ids=message.ids,
            recipient=message.recipient,
        )

    def close(self) -> None:
        """No more lines; a file that was made for none is not left behind."""
        if self._fd >= 0:
            if self._is_new and not os.fstat(self._fd).st_size:
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written: {error.strerror}; make room, the conversation is "
                f"safe up to here"
            ) from None
