"""An interpreter of the few pickle instructions that lists of images need, in place of ``pickle.load``.

It builds bytes, texts, numbers, lists and tuples, and describes the arrays of numpy without making any. A pickle can
name nothing else, and so run nothing. Memory and time follow the size of the content, whatever it says.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Any

# Each instruction makes at most one small object. An image takes about ten of them, and has far more than 300 bytes.
_FREE_INSTRUCTIONS, _BYTES_PER_INSTRUCTION = 1 << 18, 32

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_NUMBERS = {ord("K"): (1, False), ord("M"): (2, False), ord("J"): (4, True)}
_BYTES = {ord("U"): 1, ord("T"): 4, ord("C"): 1, ord("B"): 4, 0x8E: 8, 0x96: 8}  # and the bytes of their length
_TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
_EMPTY = {ord("]"): list, ord(")"): tuple}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUTS, _GETS = {ord("q"): 1, ord("r"): 4}, {ord("h"): 1, ord("j"): 4}
_IGNORED = {0x80: 1, 0x95: 8}  # PROTO and FRAME

_NUMPY = ("numpy.core", "numpy._core")  # before and since numpy 2
_NAMES = {
    **dict.fromkeys((f"{package}.multiarray _reconstruct" for package in _NUMPY), "array"),
    **dict.fromkeys((f"{package}.numeric _frombuffer" for package in _NUMPY), "from buffer"),
    **dict.fromkeys((f"{package}.multiarray scalar" for package in _NUMPY), "scalar"),
    **dict.fromkeys(("builtins bytearray", "__builtin__ bytearray", "builtins bytes", "__builtin__ bytes"), "bytes"),
    "numpy dtype": "dtype",
    "numpy ndarray": "type",
    "_codecs encode": "encode",
}


class Refusal(Exception):
    """A pickle that is damaged, or asks for more than lists of images need."""


@dataclass(eq=False)
class Array:
    """What a pickle says of a numpy array or scalar.

    Attributes:
        kind: its dtype: ``u1``, ``b1``, ``i8``, ``O8`` …
        data: its bytes, little-endian; of an array of objects (``O8``), these.
    """

    kind: str = ""
    data: bytes | list[Any] = field(default=b"", repr=False)


@dataclass(eq=False)
class _Kind:
    """What a pickle says of a numpy dtype."""

    name: str


@dataclass(frozen=True)
class _Function:
    """A name that a pickle may call; what it does is written in :meth:`_Interpreter._call`."""

    name: str


def unpickle(content: bytes) -> Any:
    """Return the value that a pickle of any protocol describes, of ``bytes``, ``str``, ``int``, ``bool``, ``None``,
    ``list``, ``tuple`` and :class:`Array`.

    Texts of Python 2 and bytearrays are ``bytes``. Values that the pickle repeats are one object.

    Raises:
        Refusal: it is damaged, or asks for anything else; the message names what, and the place.
    """
    interpreter = _Interpreter(content)
    try:
        return interpreter.run()
    except Refusal as error:
        raise Refusal(f"{error} (at byte {interpreter.at:,})") from error


def describe(value: Any) -> str:
    """Describe a value by its type, for a message."""
    if isinstance(value, Array):
        return f"a numpy array of dtype {value.kind[:20] or 'unknown'}"
    kinds = {list: "a list", tuple: "a tuple", str: "a text", bytes: "bytes", int: "a number", bool: "a truth value"}
    return kinds.get(type(value), "nothing" if value is None else "something else")


class _Interpreter:
    """State of an interpretation.

    Attributes:
        at: offset of the next byte.
    """

    def __init__(self, content: bytes) -> None:
        self.at = 0
        self._content = content
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0  # bytes that texts were encoded to: a memo could repeat one without end

    def run(self) -> Any:
        """Return the value that the pickle describes.

        Raises:
            Refusal: it is damaged, or holds anything else than images and flags need.
        """
        for _ in range(_FREE_INSTRUCTIONS + len(self._content) // _BYTES_PER_INSTRUCTION):
            code = self._take(1)[0]
            if code == ord("."):
                return self._pop()
            self._execute(code)
        raise Refusal("it has more instructions than images and flags need")

    def _execute(self, code: int) -> None:
        if code in _CONSTANTS:
            self._stack.append(_CONSTANTS[code])
        elif code in _NUMBERS:
            size, signed = _NUMBERS[code]
            self._stack.append(int.from_bytes(self._take(size), "little", signed=signed))
        elif code in _BYTES:
            self._stack.append(self._take(self._number(_BYTES[code])))
        elif code in _TEXTS:
            self._stack.append(self._text(self._take(self._number(_TEXTS[code]))))
        elif code in _EMPTY:
            self._stack.append(_EMPTY[code]())
        elif code in _TUPLES:
            self._stack.append(tuple(self._pop_many(_TUPLES[code])))
        elif code in _PUTS:
            self._put(self._number(_PUTS[code]))
        elif code in _GETS:
            self._get(self._number(_GETS[code]))
        elif code in _IGNORED:
            self._take(_IGNORED[code])
        elif code in _OTHERS:
            _OTHERS[code](self)
        else:
            raise Refusal(f"the instruction {bytes([code])!r} has no place in such a file")

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise Refusal("it ends in the middle of a value")
        self.at += size
        return self._content[self.at - size : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> bytes:
        end = self._content.find(b"\n", self.at)
        if end < 0:
            raise Refusal("it ends in the middle of a line")
        return self._take(end + 1 - self.at)[:-1]

    def _line_number(self) -> int:
        line = self._line().removesuffix(b"L")
        if len(line) > 20 or not line.lstrip(b"-").isdigit():
            raise Refusal("a number is damaged")
        return int(line)

    def _text(self, encoded: bytes, encoding: str = "utf-8") -> str:
        try:
            return encoded.decode(encoding)
        except UnicodeDecodeError:
            raise Refusal("a text is damaged") from None

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refusal("it is damaged: a value is missing")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Refusal("it is damaged: a mark is missing")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _put(self, key: int) -> None:
        self._memo[key] = self._top()

    def _get(self, key: int) -> None:
        if key not in self._memo:
            raise Refusal("it is damaged: it refers to a value that is not there")
        self._stack.append(self._memo[key])

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Refusal(f"values are added to {describe(target)}")
        target.extend(values)

    def _int(self) -> None:
        number = self._line()
        flags = {b"00": False, b"01": True}
        if number in flags:
            self._stack.append(flags[number])
        else:
            self.at -= len(number) + 1
            self._stack.append(self._line_number())

    def _quoted(self) -> None:
        line = self._line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise Refusal("a quoted text is damaged")
        try:
            self._stack.append(codecs.escape_decode(line[1:-1])[0])
        except ValueError:
            raise Refusal("a quoted text is damaged") from None

    def _name(self, module: Any, name: Any) -> None:
        texts = [part if isinstance(part, str) else "?" for part in (module, name)]
        if (found := _NAMES.get(" ".join(texts))) is None:
            wanted = ".".join(texts)
            raise Refusal(f"it asks for {wanted[:100]!r}, which no set of images needs; loading it could run code")
        self._stack.append(_Function(found))

    def _global(self) -> None:
        self._name(self._line().decode("latin-1"), self._line().decode("latin-1"))

    def _reduce(self) -> None:
        function, arguments = self._pop_many(2)
        if not isinstance(function, _Function) or type(arguments) is not tuple:
            raise Refusal(f"{describe(function)} is called")
        self._stack.append(self._call(function.name, arguments))

    def _call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        match function, arguments:
            case "array", (_Function("type"), _, _):
                return Array()
            case "from buffer", (bytes(data), _Kind(kind), tuple(), _):
                return Array(kind, data)
            case "scalar", (_Kind(kind), bytes(data)):
                return Array(kind, data)
            case "dtype", (str(name), _, _):
                return _Kind(name)
            case "dtype", (bytes(name), _, _):  # of Python 2
                return _Kind(name.decode("latin-1"))
            case "bytes", (bytes(data),):
                return data
            case "bytes", ():
                return b""
            case "encode", (str(text), "latin1" | "latin-1"):
                return self._encode(text)
        raise Refusal("a function of numpy is called in an unknown way")

    def _encode(self, text: str) -> bytes:
        self._encoded += len(text)
        if self._encoded > len(self._content):
            raise Refusal("it encodes more text than it holds")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise Refusal("a text that stands for bytes is damaged") from None

    def _build(self) -> None:
        target, state = self._pop_many(2)
        match target, state:
            case Array(), (_, tuple(), _Kind(kind), _, bytes() | list() as data):
                target.kind, target.data = kind, data
            case _Kind(), (_, str() | bytes() as order, *_) if order not in (">", b">"):
                pass
            case _:
                raise Refusal(f"a state is given to {describe(target)}")
        self._stack.append(target)


_OTHERS = {
    ord("("): lambda self: self._marks.append(len(self._stack)),
    ord("t"): lambda self: self._stack.append(tuple(self._pop_to_mark())),
    ord("l"): lambda self: self._stack.append(self._pop_to_mark()),
    ord("a"): lambda self: self._append([self._pop()]),
    ord("e"): lambda self: self._append(self._pop_to_mark()),
    ord("p"): lambda self: self._put(self._line_number()),
    ord("g"): lambda self: self._get(self._line_number()),
    0x94: lambda self: self._put(len(self._memo)),
    ord("I"): _Interpreter._int,
    ord("L"): lambda self: self._stack.append(self._line_number()),
    0x8A: lambda self: self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True)),
    ord("S"): _Interpreter._quoted,
    ord("V"): lambda self: self._stack.append(self._text(self._line(), "raw-unicode-escape")),
    ord("c"): _Interpreter._global,
    0x93: lambda self: self._name(*self._pop_many(2)),
    ord("R"): _Interpreter._reduce,
    ord("b"): _Interpreter._build,
}
