"""Go's text/template, as much of it as templates of Ollama use, and the values that Ollama gives them.

Written after the documentation of the package and Ollama's sources, and held against Go itself once: the two render the
same on every template and conversation of ``tests/exporting/test_ollama.py``.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(:=|=|,|\(|\))|([^\s(),="]+))')


@dataclass
class _Node:
    """Text, or an action with what it encloses."""

    kind: str
    words: list[str]
    body: list["_Node"] = field(default_factory=list)
    otherwise: list["_Node"] = field(default_factory=list)


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that Ollama makes of a conversation: neighbours of one role joined, and all system messages."""
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = {"System": system, "Messages": collated, "Response": ""}
    nodes, closing = _Parser(_lex(template)).block()
    assert closing is None
    return "".join(_run(nodes, data, {"$": data}))


def _lex(template: str) -> list[_Node]:
    nodes, trim = [], False
    for piece in re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL):
        if not piece.startswith("{{"):
            nodes.append(_Node("text", [piece.lstrip(" \t\r\n") if trim else piece]))
            trim = False
            continue
        inner = piece[2:-2]
        if inner.startswith("- "):
            nodes[-1].words[0] = nodes[-1].words[0].rstrip(" \t\r\n")
            inner = inner[1:]
        if trim := inner.endswith(" -"):
            inner = inner[:-1]
        words = [next(filter(None, match)) for match in _TOKEN.findall(inner)]
        nodes.append(_Node(words[0] if words[0] in ("if", "else", "range", "end") else "action", words))
    return nodes


class _Parser:
    def __init__(self, nodes: list[_Node]) -> None:
        self.nodes = iter(nodes)

    def block(self) -> tuple[list[_Node], _Node | None]:
        """Nodes up to the one that closes them."""
        found = []
        for node in self.nodes:
            if node.kind in ("else", "end"):
                return found, node
            if node.kind in ("if", "range"):
                self.branch(node)
            found.append(node)
        return found, None

    def branch(self, node: _Node) -> None:
        node.body, closing = self.block()
        if closing and closing.words[1:2] == ["if"]:  # closed by the same end
            node.otherwise = [_Node("if", closing.words[1:])]
            self.branch(node.otherwise[0])
        elif closing and closing.kind == "else":
            node.otherwise, closing = self.block()
            assert closing and closing.kind == "end"


def _run(nodes: Sequence[_Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    """What nodes write. Variables that are declared within a block end with it; assigned ones keep their value."""
    for node in nodes:
        if node.kind == "text":
            yield node.words[0]
        elif node.kind == "if":
            yield from _run(node.body if _value(node.words[1:], dot, variables) else node.otherwise, dot, variables)
        elif node.kind == "range":
            index, comma, item, declares, *words = node.words[1:]
            assert (comma, declares) == (",", ":=")
            for i, each in enumerate(_value(words, dot, variables)):
                yield from _run(node.body, each, variables | {index: i, item: each})
        elif node.words[1:2] == [":="]:
            variables[node.words[0]] = [_value(node.words[2:], dot, variables)]
        elif node.words[1:2] == ["="]:
            variables[node.words[0]][0] = _value(node.words[2:], dot, variables)
        else:
            yield str(_value(node.words, dot, variables))


def _value(words: Sequence[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    """A call of a function with its arguments, or one argument alone."""
    arguments, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "(":
            depth, inner = 1, []
            while depth:
                inner.append(rest.pop(0))
                depth += {"(": 1, ")": -1}.get(inner[-1], 0)
            arguments.append(_value(inner[:-1], dot, variables))
        elif word in _FUNCTIONS:
            arguments.append(_FUNCTIONS[word])
        elif word.startswith('"'):
            arguments.append(json.loads(word))
        elif word.isdigit():
            arguments.append(int(word))
        else:
            arguments.append(_place(word, dot, variables))
    function, *given = arguments
    return function(*given) if callable(function) else function


def _place(word: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    start, *names = word.split(".")
    value = dot
    if start:
        value = variables[start]
        value = value[0] if isinstance(value, list) else value  # a declared variable is a box that can be assigned to
    for name in filter(None, names):
        value = value[name]
    return value


_FUNCTIONS = {
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda items, start: items[start:],
}
