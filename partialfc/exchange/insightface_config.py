"""Reader of arcface_torch's config files: Python that is parsed, and never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partialfc.errors import ConfigError
from partialfc.files import read_bounded
from partialfc.options import shorten

_MAX_BYTES = 1 << 18
_MAX_NUMBER = 1e18  # arithmetic ends here: 9**9**9 would not
_MAX_EXPONENT = 64

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class _NotPlain(Exception):
    """An expression that is no literal, no name of one, and no arithmetic of numbers."""


def read_insightface_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the keys that a config file sets, and what in it was not read, a phrase each.

    Read are ``config = edict()``, ``config.key = value``, ``config["key"] = value``, ``config.update(…)``, plain
    variables, and values of literals, of other keys and variables, and of arithmetic with numbers.

    Raises:
        ConfigError: the file cannot be read, is not Python, or makes no ``config``.
    """
    try:
        tree = ast.parse(read_bounded(path, _MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(f"{path}{place} is not Python") from error
    reader = _Reader()
    for statement in tree.body:
        try:
            reader.read(statement)
        except (_NotPlain, RecursionError):
            reader.unread.append(f"line {statement.lineno}: `{_shown(statement)}`")
    if not isinstance(config := reader.names.get("config"), dict):
        raise ConfigError(f"{path} makes no `config = edict()`; expected a config of arcface_torch")
    return config, reader.unread


def _shown(statement: ast.stmt) -> str:
    try:
        return shorten(ast.unparse(statement).splitlines()[0])[1:-1]
    except RecursionError:
        return "…"


class _Reader:
    """Values of a file's names, as far as they are plain."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.unread: list[str] = []

    def read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(ast.Constant()):
                pass
            case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                self._assign(target, value)
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(name), "update"), arguments, keywords)):
                self._dict(ast.Name(name)).update(self._new_dict(arguments, keywords))
            case _:
                raise _NotPlain

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target:
            case ast.Name(key):
                place = self.names
            case ast.Attribute(owner, key) | ast.Subscript(owner, ast.Constant(str(key))):
                place = self._dict(owner)
            case _:
                raise _NotPlain
        try:
            place[key] = self._value(value)
        except BaseException:
            place.pop(key, None)  # no earlier value stands for one that cannot be read
            raise

    def _dict(self, expression: ast.expr) -> dict[str, Any]:
        found = self._value(expression)
        if not isinstance(found, dict):
            raise _NotPlain
        return found

    def _new_dict(self, arguments: list[ast.expr], keywords: list[ast.keyword]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for argument in arguments:
            found |= self._dict(argument)
        for keyword in keywords:
            found |= {keyword.arg: self._value(keyword.value)} if keyword.arg else self._dict(keyword.value)
        return found

    def _value(self, expression: ast.expr) -> Any:
        match expression:
            case ast.Constant(None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(name) if name in self.names:
                return self.names[name]
            case ast.Attribute(owner, key) | ast.Subscript(owner, ast.Constant(str(key))):
                if key in (found := self._dict(owner)):
                    return found[key]
            case ast.List(elements) | ast.Tuple(elements):
                return [self._value(element) for element in elements]
            case ast.Dict(keys, values) if all(isinstance(key, ast.Constant) for key in keys):
                names = [key.value for key in keys if isinstance(key, ast.Constant)]
                return {str(name): self._value(value) for name, value in zip(names, values, strict=True)}
            case ast.Call(ast.Name("edict" | "EasyDict" | "dict"), arguments, keywords):
                return self._new_dict(arguments, keywords)
            case ast.UnaryOp(ast.USub(), operand):
                return -self._number(operand)
            case ast.BinOp(left, sign, right) if type(sign) in _BINARY:
                return self._arithmetic(type(sign), self._number(left), self._number(right))
        raise _NotPlain

    def _number(self, expression: ast.expr) -> int | float:
        value = self._value(expression)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise _NotPlain
        return value

    def _arithmetic(self, sign: type[ast.operator], left: int | float, right: int | float) -> int | float:
        if sign is ast.Pow and not (0 <= right <= _MAX_EXPONENT or left in (2, 10)):
            raise _NotPlain
        try:
            found: int | float | complex = _BINARY[sign](left, right)
        except (ArithmeticError, ValueError):
            raise _NotPlain from None
        if isinstance(found, complex):
            raise _NotPlain
        return found
