"""Strict reading of YAML: a text for a text key, and an error with its line for what its author cannot have meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from partialfc.config.keys import element_of, section_of, takes
from partialfc.errors import ConfigError
from partialfc.files import read_bounded
from partialfc.options import shorten

MAX_BYTES = 1 << 20
_MAX_DEPTH = 50
_MAX_VALUES = 50_000  # what aliases repeat counts, too

_TAG = "tag:yaml.org,2002:"
_NUMBER_STARTS = [*"-+.0123456789"]
_FLOAT = re.compile(
    r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def read_yaml(path: Path, schema: Any = None) -> Any:
    """Return the content of a YAML file.

    Args:
        schema: type that the content is meant for. Only its keys of type text or path take a value such as ``2024`` as
            it is written, and only paths are expanded.

    Raises:
        ConfigError: the file cannot be read or is not valid.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: byte {error.start} is not UTF-8") from error
    try:
        return _Loader(text).read(schema)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{path}{where}: {_describe(error)}") from error


def read_value(key: str, text: str, schema: Any = None) -> Any:
    """Return the value of ``key=text`` on a command line: YAML without comments, so that ``#`` stands for itself.

    Args:
        schema: type of the key. A text is taken as it is, unless it is quoted, or a list ``[a, b]`` where one may be.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    hash_sign = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in text)
    try:
        loader = _Loader(text.replace("#", hash_sign), hash_sign)
        is_list = element_of(schema) is not None and text.startswith("[")
        is_quoted = re.fullmatch(r"""(["']).*\1""", text, re.DOTALL)
        if takes(schema, str, Path) and text and not is_quoted and not is_list:
            tag = loader.resolve(yaml.ScalarNode, text, (True, False))
            return loader.value(yaml.ScalarNode(tag, text, style=None), schema, key)
        return loader.read(schema, key)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {_describe(error)}, in {shorten(text)}") from error


def dump_yaml(tree: Any) -> str:
    """Return YAML from which :func:`read_yaml` reads an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """A loader of plain values, bounded in depth and size, to which a key given twice is an error.

    Args:
        text: YAML.
        hash_sign: character that stands for ``#`` in ``text``.
    """

    # None of SafeLoader's: it knows dates and numbers of base 60, and takes 1e-05 for a text.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # an instance variable in types-PyYAML

    def __init__(self, text: str, hash_sign: str = "#") -> None:
        super().__init__(text)
        self._hash_sign = hash_sign
        self._depth = self._size = 0
        self._size_of_anchor: dict[str, int] = {}

    def read(self, schema: Any, key: str = "") -> Any:
        """Return the value of the only document; None if it is empty."""
        node = self.get_single_node()
        return None if node is None else self.value(node, schema, key)

    def value(self, node: yaml.Node, schema: Any, key: str) -> Any:
        """Return a node's value in the type that ``schema`` asks for; containers are new at each place."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            fields = getattr(section_of(schema), "model_fields", {})
            values = {}
            for name_node, child in node.value:
                name = self._text(name_node)
                annotation = fields[name].annotation if name in fields else None
                values[name] = self.value(child, annotation, f"{key}.{name}".lstrip("."))
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, element_of(schema), key) for child in node.value]
        assert isinstance(node, yaml.ScalarNode)
        text = self._text(node)
        is_null = node.tag == f"{_TAG}null" and (text != "~" or takes(schema, type(None)))
        if takes(schema, str, Path) and not is_null:
            return _expanded(text, key) if takes(schema, Path) else text
        if node.tag == f"{_TAG}str":
            return text
        try:
            return self.construct_object(node)
        except ValueError as error:
            raise ConfigError(f"{key}: expected a number, got {shorten(text)}") from error

    def _text(self, node: yaml.ScalarNode) -> str:
        return str(node.value).replace(self._hash_sign, "#")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node, within the bounds."""
        event, before = self.peek_event(), self._size
        anchor: Any = getattr(event, "anchor", None)
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self.anchors and anchor not in self._size_of_anchor:
            raise _refusal(event, f"the anchor {anchor!r} holds itself")
        if getattr(event, "tag", None) not in (None, "!", f"{_TAG}str"):
            raise _refusal(
                event, f"tags such as {event.tag.replace(_TAG, '!!')} are not taken here; write a plain value"
            )
        if self._depth == _MAX_DEPTH:
            raise _refusal(event, f"values are nested deeper than {_MAX_DEPTH} levels")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        self._size += self._size_of_anchor.get(anchor, 1) if is_alias else 1
        if self._size > _MAX_VALUES:
            raise _refusal(event, f"more than {_MAX_VALUES:,} values, those that aliases repeat included")
        if anchor and not is_alias:
            self._size_of_anchor[anchor] = self._size - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping whose keys are texts, none of them twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _refusal(name, "expected a word as a key, got a list or a mapping")
            line = name.start_mark.line + 1
            if name.value in first:
                raise _refusal(name, f"the key {name.value!r} is given twice, first in line {first[name.value]}")
            first[name.value] = line
        return node


_BOOL = re.compile(r"(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_INT = re.compile(r"[-+]?(0b[0-1_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOL, [*"yYnNtTfFoO"])
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, _NUMBER_STARTS)
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, _NUMBER_STARTS)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<$"), ["<"])


class _Dumper(yaml.SafeDumper):
    """Quotes texts that :class:`_Loader` would take for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, _NUMBER_STARTS)


def _expanded(path: str, key: str) -> str:
    """Return a path with ``~`` replaced by the home folder."""
    found = _VARIABLE.search(path)
    if found:
        raise ConfigError(
            f"{key}: {found[0]} is not expanded here; write its value, or give the key on the command line, where the "
            f'shell expands it: {key}="{path}"'
        )
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{key}: there is no home folder for {shorten(path)}") from error


class _Refusal(yaml.MarkedYAMLError):
    """YAML that is valid, and still not taken."""


def _refusal(where: Any, problem: str) -> _Refusal:
    """Return an error at a node or an event."""
    return _Refusal(problem=problem, problem_mark=where.start_mark)


def _describe(error: yaml.YAMLError) -> str:
    """Return an error in one line."""
    if isinstance(error, _Refusal):
        return str(error.problem)
    problem = (error.problem or error.context) if isinstance(error, yaml.MarkedYAMLError) else error
    return "not valid YAML: " + " ".join(str(problem).split())
