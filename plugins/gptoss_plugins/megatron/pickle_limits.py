"""What a pickle would make, found without making any of it.

A few hundred bytes can ask for a tuple in a tuple, a million deep, which overflows the stack when it
is hashed; for a tuple that holds the one before it twice, forty times over, whose hash takes years;
or for entry 2^31 of the memo, for which the unpickler takes 32 GB.
"""

from __future__ import annotations

import pickletools
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST = 256 << 20  # bytes; .metadata of the 120B takes 6, with the plans of a training run 30
_MOST_STEPS = 1 << 24  # opcodes, each of which may make an object of 200 bytes
_LARGEST = 1 << 14  # items of a tuple, all that are in its items counted as often as they are
_COUNTED = {  # bytes before an argument that say how long it is
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def require_bounded(data: bytes) -> None:
    """Follow a pickle's opcodes to its end, and what they do to the stack.

    Raises:
        ValueError: it makes too much, or is none.

    """
    if len(data) > LONGEST:
        raise ValueError(f"it takes {len(data):,} bytes")
    try:
        _Walk(data).to_its_end()
    except (IndexError, KeyError):
        raise ValueError("it is cut short or damaged") from None


class _Walk:
    """The unpickler's stack, each object in it told by its size: 1, but for tuples."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def to_its_end(self) -> None:
        """All of it. What most of a ``.metadata`` is made of is done here, for speed."""
        data, at, stack, memo = self._data, 0, self._stack, self._memo
        atoms, drops = _ATOMS, _DROPS
        for _ in range(min(len(data), _MOST_STEPS)):
            code = data[at]
            at += 1
            if (size := atoms[code]) >= 0:
                at += size
                stack.append(1)
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif drop := drops[code]:
                del stack[-drop:]
            elif code == _MARK:
                self._marks.append(len(stack))
            elif code == _STOP:
                return
            else:
                self._at = at
                _ACTS[code](self)
                at = self._at
        raise ValueError(f"it has no end within {_MOST_STEPS:,} steps")

    def counted(self, width: int) -> None:
        """Text, bytes or a number whose length comes first."""
        start = self._at + width
        self._at = start + int.from_bytes(self._data[self._at : start], "little")
        self._stack.append(1)

    def line(self) -> bytes:
        """An argument that ends with its line."""
        start, self._at = self._at, self._data.find(b"\n", self._at) + 1
        if not self._at:
            raise IndexError
        return self._data[start : self._at - 1]

    def lines(self, count: int) -> None:
        """An object that is told in lines."""
        for _ in range(count):
            self.line()
        self._stack.append(1)

    def number(self, width: int) -> int:
        """The argument of what has to do with the memo."""
        if not width:
            return int(self.line())
        start, self._at = self._at, self._at + width
        return int.from_bytes(self._data[start : self._at], "little")

    def put(self, width: int) -> None:
        """Keep the top in the memo; every pickler numbers its entries one by one."""
        self._keep(self.number(width))

    def memoize(self) -> None:
        self._keep(len(self._memo))

    def _keep(self, index: int) -> None:
        if not 0 <= index <= len(self._memo) + 1:
            raise ValueError("its memo has holes")
        self._memo[index] = self._stack[-1]

    def get(self, width: int) -> None:
        self._stack.append(self._memo[self.number(width)])

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def to_mark(self, puts: int) -> None:
        """Take all from the last mark on."""
        del self._stack[self._marks.pop() :]
        self._stack.extend([1] * puts)

    def take(self, count: int, puts: int, skip: int) -> None:
        """Take objects, and put others in their place."""
        self._at += skip
        if count > len(self._stack):
            raise IndexError
        del self._stack[len(self._stack) - count :]
        self._stack.extend([1] * puts)

    def pop(self) -> None:
        """Take one object, or a mark if that is on top."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def tuple_to_mark(self) -> None:
        self._tuple(self._marks.pop())

    def tuple_of(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError
        self._tuple(len(self._stack) - count)

    def _tuple(self, first: int) -> None:
        size = 1 + sum(self._stack[first:])
        if size > _LARGEST:
            raise ValueError(f"it nests tuples to more than {_LARGEST:,} items")
        self._stack[first:] = [size]


_SPECIAL: dict[str, Callable[[_Walk], None]] = {
    "MARK": _Walk.mark,
    "POP": _Walk.pop,
    "DUP": _Walk.duplicate,
    "MEMOIZE": _Walk.memoize,
    "TUPLE": _Walk.tuple_to_mark,
    **{f"TUPLE{n}": partial(_Walk.tuple_of, count=n) for n in (1, 2, 3)},
    **{n: partial(_Walk.put, width=w) for n, w in (("PUT", 0), ("BINPUT", 1), ("LONG_BINPUT", 4))},
    **{n: partial(_Walk.get, width=w) for n, w in (("GET", 0), ("BINGET", 1), ("LONG_BINGET", 4))},
    "GLOBAL": partial(_Walk.lines, count=2),
    **{name: partial(_Walk.to_mark, puts=0) for name in ("APPENDS", "SETITEMS", "ADDITEMS")},
}


# What takes objects from above one that it changes, or that it calls and replaces by another.
_TAKEN = {"APPEND": 1, "BUILD": 1, "SETITEM": 2, "REDUCE": 1, "NEWOBJ": 1, "NEWOBJ_EX": 2}


def _act(code: pickletools.OpcodeInfo) -> Callable[[_Walk], None]:
    """What an opcode does, told by pickletools where it is nothing special."""
    size = code.arg.n if code.arg else 0
    if code.name in _SPECIAL:
        return _SPECIAL[code.name]
    if code.name == "INST":
        return _inst
    if pickletools.markobject in code.stack_before:
        return partial(_Walk.to_mark, puts=len(code.stack_after))
    if size in _COUNTED:
        return partial(_Walk.counted, width=_COUNTED[size])
    if size == pickletools.UP_TO_NEWLINE:
        return partial(_Walk.lines, count=1)
    takes, puts = len(code.stack_before), len(code.stack_after)
    return partial(_Walk.take, count=takes, puts=puts, skip=size)


def _inst(walk: _Walk) -> None:
    """An object of a class that two lines name, from what is there from the mark on."""
    walk.lines(2)
    walk.to_mark(1)


def _unknown(walk: _Walk) -> None:
    raise ValueError("it has an unknown opcode")


_STOP, _MARK, _MEMOIZE, _BINGET, _LONG_BINGET = b".(\x94hj"
_ACTS: list[Callable[[_Walk], None]] = [_unknown] * 256
_ATOMS = [-1] * 256  # bytes of the argument of what only puts one object
_DROPS = [0] * 256
for _code in pickletools.opcodes:
    _ACTS[ord(_code.code)] = _act(_code)
    _DROPS[ord(_code.code)] = _TAKEN.get(_code.name, 0)
    _plain = not _code.stack_before and len(_code.stack_after) == 1 and _code.name not in _SPECIAL
    if _plain and (_code.arg is None or _code.arg.n >= 0):
        _ATOMS[ord(_code.code)] = _code.arg.n if _code.arg else 0
