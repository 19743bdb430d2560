"""Byte-level BPE: the bytes of a token, and text out of tokens as its bytes come in.

A vocabulary of this kind spells each of the 256 bytes as one printable character: printable Latin-1
as itself, all others from U+0100 on (``bytes_to_unicode`` of
https://github.com/openai/gpt-2/blob/master/src/encoder.py). Tokens may end inside a character.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _alphabet()  # character -> byte


def bytes_of(piece: str) -> bytes:
    """What a token of the vocabulary stands for; one that is not spelled in bytes, for its text."""
    try:
        return bytes(map(BYTES.__getitem__, piece))
    except KeyError:
        return piece.encode()


class Detokenizer:
    """Token ids in, text out, as soon as the bytes of a character are complete.

    Args:
        token_bytes: the bytes of a token id; none for tokens that are not shown.

    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What was held back: U+FFFD for the start of a character that never ended."""
        return self._decoder.decode(b"", final=True)
