"""A pickle read as data, by Python 2 or 3, protocols 0 to 5: nothing in it is executed.

A pickle is a program. Here its instructions are read one by one by a machine that can only put bytes, numbers, lists and
tuples together. The few functions that bytes and numpy's arrays of bytes and bools need are known by name and done here by
hand; nothing is looked up, imported or called. Everything else is refused, with its place in the file.
"""

from __future__ import annotations

import codecs
import math
import os
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lce_dist.errors import DataError

_FREE_INSTRUCTIONS = 1 << 17
_BYTES_AN_INSTRUCTION = 16  # of what is read; images have hundreds
_TEXT_LIMIT = 100
_Reader = Callable[[Any], Any]
_OPCODES: dict[str, tuple[str, _Reader | None]] = {
    one.code: (one.name, None if one.arg is None else one.arg.reader) for one in pickletools.opcodes
}


def read_pickled_data(path: Path) -> Any:
    """What a pickle holds: bytes (text and Python 2's str too, where it is bytes), numbers, bools, None, lists, tuples and
    :class:`PickledArray`.

    Errors: DataError, with the place in bytes, for an instruction that such data do not need, and for a file that is
    damaged, cut off, or goes on after its end. **Memory**: the file's bytes, and some for each instruction, of which there
    may be 2^17 and one for every 16 bytes.
    """
    try:
        with path.open("rb") as file:
            return _Machine(path, file).run()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Name a file of pickled data") from None


class _RefusedError(Exception):
    """Why an instruction is not carried out."""


@dataclass(frozen=True)
class _Name:
    """A function or class that the file names; only ever a word to us."""

    what: str


@dataclass(frozen=True, eq=False)
class _Text:
    """Text of characters up to U+00FF, one byte each: Python 3 wraps bytes in it for protocols that have none."""

    raw: bytes


@dataclass(eq=False)
class _Type:
    """A numpy dtype: ``u1`` or ``b1``."""

    code: str


@dataclass(eq=False)
class PickledArray:
    """A numpy array in C order; empty until its state is told."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    raw: bytes = b""


_MARK = object()
# by what a name stands for; numpy 1 and 2 have its core in other places, Python 2 and 3 the built-in names
_NAMES = {
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "builtins bytes": "bytes",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"numpy.{core}.multiarray _reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": "scalar" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "frombuffer" for core in ("core", "_core")},
}
_TYPES = {b"u1": "u1", b"|u1": "u1", b"uint8": "u1", b"b1": "b1", b"|b1": "b1", b"bool": "b1", b"?": "b1"}


class _File:
    """What pickletools' readers want of a file; never asks for more than is left, however much an instruction claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def read(self, count: int) -> bytes:
        return self._passed(self._file.read(max(0, min(count, self.size - self.place))))

    def readline(self) -> bytes:
        return self._passed(self._file.readline())

    def _passed(self, some: bytes) -> bytes:
        self.place += len(some)
        return some


class _Machine:
    """A stack, a memo, and what each instruction does to them."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, _File(file)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Everything up to STOP; returns what was made. Errors: DataError."""
        for number, (name, argument, place) in enumerate(self._instructions()):
            if number > _FREE_INSTRUCTIONS + place // _BYTES_AN_INSTRUCTION:
                raise self._error(place, f"{number:,} instructions so far are too many for images")
            if name != "STOP" and name not in _STEPS:
                raise self._error(place, f"{name} is not an instruction for data")
            try:
                if name == "STOP":
                    made = self._pop()
                    break
                _STEPS[name](self, argument)
            except _RefusedError as error:
                raise self._error(place, f"{name}: {error}") from None
        left = self._file.size - self._file.place
        if left or self._stack:
            what = f"{left} bytes follow" if left else "values are left over"
            raise self._error(self._file.place, f"{what} after the end of the pickle")
        return made

    def _instructions(self) -> Iterator[tuple[str, Any, int]]:
        """As pickletools.genops, which cannot read Python 2's text of bytes (STRING)."""
        while True:
            place = self._file.place
            code = self._file.read(1)
            if not code:
                raise self._error(place, "the file ends in the middle")
            instruction = _OPCODES.get(code.decode("latin-1"))
            if instruction is None:
                raise self._error(place, f"{code!r} is no instruction")
            name, reader = instruction
            argument: Any
            try:
                if name == "STRING":
                    argument = _unquoted(self._file.readline())
                else:
                    argument = None if reader is None else reader(self._file)
            except (ValueError, OverflowError) as error:
                raise self._error(place, f"{name} cannot be read ({_cut(error)}): damaged, or cut off") from None
            yield name, argument, place

    def _error(self, place: int, why: str) -> DataError:
        return DataError(
            f"{self._path}: at byte {place}, {why}; must be pickled bytes and bools alone. Nothing was executed"
        )

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _RefusedError("nothing is on the stack")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _above_mark(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise _RefusedError("no mark is on the stack")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def marked(self, kind: Callable[[list[Any]], Any]) -> None:
        self._stack.append(kind(self._above_mark()))

    def append(self) -> None:
        value = self._pop()
        self._list().append(value)

    def appends(self) -> None:
        values = self._above_mark()
        self._list().extend(values)

    def _list(self) -> list[Any]:
        value = self._top()
        if not isinstance(value, list):
            raise _RefusedError(f"{kind_of(value)} is no list")
        return value

    def put(self, place: int) -> None:
        self._memo[place] = self._top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, place: int) -> None:
        if place not in self._memo:
            raise _RefusedError(f"nothing was kept as {place}")
        self._stack.append(self._memo[place])

    def name(self, words: str) -> None:
        if words not in _NAMES:
            raise _RefusedError(f"{_cut(words)!r} is neither bytes nor an array of numpy")
        self._stack.append(_Name(_NAMES[words]))

    def name_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self.name(f"{_word(module).decode('latin-1')} {_word(name).decode('latin-1')}")

    def reduce(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, _Name) or name.what not in _CALLS or not isinstance(arguments, tuple):
            raise _RefusedError(f"{kind_of(name)} of {kind_of(arguments)} is not how bytes or arrays are made")
        self._stack.append(_CALLS[name.what](*_exactly(arguments, name.what)))

    def build(self) -> None:
        state, value = self._pop(), self._top()
        if isinstance(value, _Type):
            # (version, byte order, ...): of one byte, so its order has no meaning; a third value is for types with parts
            if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
                raise _RefusedError("the state of a dtype has parts")
        elif isinstance(value, PickledArray) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, _, raw = state
            filled = _filled(raw, dtype, shape)
            value.dtype, value.shape, value.raw = filled.dtype, filled.shape, filled.raw
        else:
            raise _RefusedError(f"{kind_of(value)} has no state of {kind_of(state)}")


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, _Text) or _word(encoding) not in (b"latin1", b"latin-1"):
        raise _RefusedError("bytes come from text in latin1")
    return text.raw


def _dtype(code: Any, align: Any, copy: Any) -> _Type:
    if _word(code) not in _TYPES:
        raise _RefusedError(
            f"arrays are of {_cut(_word(code).decode('latin-1'))!r}; must be of bytes (u1) or bools (b1)"
        )
    return _Type(_TYPES[_word(code)])


def _reconstruct(kind: Any, shape: Any, code: Any) -> PickledArray:
    if kind != _Name("ndarray"):
        raise _RefusedError(f"{kind_of(kind)} is no array")
    return PickledArray()


def _scalar(dtype: Any, raw: Any) -> bool:
    if not isinstance(dtype, _Type) or dtype.code != "b1" or not isinstance(raw, bytes) or len(raw) != 1:
        raise _RefusedError("a single number; must be a bool")
    return raw != b"\0"


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    return _filled(raw, dtype, shape)


def _filled(raw: Any, dtype: Any, shape: Any) -> PickledArray:
    sizes = isinstance(shape, tuple) and len(shape) > 0 and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(dtype, _Type) or not isinstance(raw, bytes) or math.prod(shape) != len(raw):
        raise _RefusedError("an array whose bytes do not fit its shape, or that holds objects")
    return PickledArray(dtype.code, shape, raw)


_CALLS: dict[str, Callable[..., Any]] = {
    "encode": _encode,
    "bytes": lambda: b"",
    "dtype": _dtype,
    "reconstruct": _reconstruct,
    "scalar": _scalar,
    "frombuffer": _frombuffer,
}
_NUM_ARGUMENTS = {"encode": 2, "bytes": 0, "dtype": 3, "reconstruct": 3, "scalar": 2, "frombuffer": 4}


def _exactly(arguments: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    if len(arguments) != _NUM_ARGUMENTS[what]:
        raise _RefusedError(f"{what} of {len(arguments)} values; must be of {_NUM_ARGUMENTS[what]}")
    return arguments


def _word(value: Any) -> bytes:
    if isinstance(value, _Text):
        return value.raw
    if isinstance(value, bytes):
        return value
    raise _RefusedError(f"{kind_of(value)} is no word")


def _text(value: str) -> _Text:
    try:
        return _Text(value.encode("latin-1"))
    except UnicodeEncodeError:
        raise _RefusedError("text of characters above U+00FF") from None


def _unquoted(line: bytes) -> bytes:
    """Python 2's repr of a byte string."""
    inner = line[:-1].strip()
    if not line.endswith(b"\n") or len(inner) < 2 or inner[:1] not in (b"'", b'"') or inner[-1:] != inner[:1]:
        raise ValueError("no quotes around it")
    return codecs.escape_decode(inner[1:-1])[0]


def kind_of(value: Any) -> str:
    """What a value is, for people; never its content."""
    if isinstance(value, _Name):
        return f"the name {value.what}"
    kinds = {
        _Text: "text",
        _Type: "a dtype",
        PickledArray: "an array",
        bytes: "bytes",
        type(None): "None",
        bool: "a bool",
    }
    kinds |= {int: "a number", list: "a list", tuple: "a tuple"}
    if isinstance(value, PickledArray):
        return f"an array of {value.dtype or 'nothing'} of shape {value.shape}"
    return kinds[type(value)]


def _cut(words: object) -> str:
    return str(words)[:_TEXT_LIMIT]


_Step = Callable[[_Machine, Any], None]
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_BYTES = ("STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_BYTES_AS_TEXT = ("BINSTRING", "SHORT_BINSTRING")  # pickletools decodes these as latin-1
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_STEPS: dict[str, _Step] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "MARK": lambda machine, argument: machine.push(_MARK),
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    **{name: lambda machine, argument: machine.push(argument) for name in (*_NUMBERS, *_BYTES)},
    **{name: lambda machine, argument: machine.push(argument.encode("latin-1")) for name in _BYTES_AS_TEXT},
    **{name: lambda machine, argument: machine.push(_text(argument)) for name in _TEXTS},
    "BYTEARRAY8": lambda machine, argument: machine.push(bytes(argument)),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "LIST": lambda machine, argument: machine.marked(list),
    "APPEND": lambda machine, argument: machine.append(),
    "APPENDS": lambda machine, argument: machine.appends(),
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    "TUPLE": lambda machine, argument: machine.marked(tuple),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, argument: machine.memoize(),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda machine, argument: machine.name_of_stack(),
    "REDUCE": lambda machine, argument: machine.reduce(),
    "BUILD": lambda machine, argument: machine.build(),
}
