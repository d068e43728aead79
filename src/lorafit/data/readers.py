"""Training rows from JSON Lines files, with every fault named by file and line.

A row is a conversation, ``{"messages": [{"role": ..., "content": ...}, ...]}``, or a single exchange,
``{"prompt": ..., "completion": ...}``. Rows may carry other fields (an id, a source) and those are not read, except
the ones in ``MEANINGFUL``: other trainers act on them, so ignoring them here would quietly train something else.

Lines are split at the byte 0x0A alone. ``str.splitlines`` also splits at U+2028 and U+0085, which JSON allows unescaped
inside a string. Reading stops at the first fault: one message, one thing to mend.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lorafit.errors import DataError, MissingFileError

ROLES = ("system", "user", "assistant")
MEANINGFUL = ("system", "tools", "functions", "images", "weight", "rejected")
LAYOUTS = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'

# What other data sets call these fields and roles, where the spelling alone would not suggest the right one.
_SYNONYMS = {
    "conversation": "messages",
    "conversations": "messages",
    "dialogue": "messages",
    "turns": "messages",
    "instruction": "prompt",
    "input": "prompt",
    "question": "prompt",
    "output": "completion",
    "response": "completion",
    "answer": "completion",
    "from": "role",
    "speaker": "role",
    "value": "content",
    "text": "content",
    "human": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
}


class Message(TypedDict):
    """One turn, in the shape that chat templates and servers take.

    Attributes:
        role: One of ``ROLES``.
        content: The text of the turn; not empty.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation with at least one assistant turn.

    Attributes:
        messages: The turns in order: an optional system message, then turns of which none of the assistant's comes
            first or follows another of the assistant's.
        source: Where it stands, as ``file.jsonl:12``, for error messages.
    """

    messages: tuple[Message, ...]
    source: str


def read_examples(path: str | Path) -> list[Example]:
    """Read and check a JSON Lines file; blank lines and a UTF-8 byte order mark are passed over.

    Args:
        path: The file.

    Returns:
        Its rows in order; at least one.

    Raises:
        MissingFileError: There is no such file, or it is a directory.
        DataError: The first row that cannot be used, with its file, its line and what to do about it.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.jsonl"))
        hint = f"name a file in it: {', '.join(inside[:5])}" if inside else "give a .jsonl file"
        raise MissingFileError(f"{path} is a directory; {hint}")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.jsonl")], n=1)
        raise MissingFileError(f"no data file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    examples = [_example(line, source) for line, source in _lines(path)]
    if not examples:
        raise DataError(f"{path} has no rows; write one {LAYOUTS} on each line")
    return examples


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of ``path`` that are not blank, each with its place."""
    with path.open("rb") as file:
        if file.read(4).startswith((b"GGUF", b"PK\x03\x04", b"\x1f\x8b")):
            raise DataError(f"{path} holds no rows: it is a model or an archive; give a .jsonl file of conversations")
        file.seek(0)
        for number, raw in enumerate(file, start=1):
            source = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                guess = "the file looks like UTF-16; " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise DataError(
                    f"{source}: byte {error.start + 1} of the line is not UTF-8 text; {guess}save the file as UTF-8"
                ) from None
            if line.strip():
                yield line, source


def _example(line: str, source: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        hint = "write one whole JSON object on each line"
        if line.strip() in "[{":
            hint = "this looks like a JSON document over many lines; " + hint
        raise DataError(f"{source}: broken JSON, {error.msg} at column {error.colno}; {hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        raise DataError(f"{source}: JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: the line is {_kind(row)}, but a row must be an object: {LAYOUTS}")
    return Example(tuple(_in_order(_messages(row, source), source)), source)


def _messages(row: dict[str, Any], source: str) -> list[Message]:
    """The turns of ``row``, whichever layout it has."""
    exchange = [name for name in ("prompt", "completion") if name in row]
    if "messages" not in row and len(exchange) < 2:
        wanted = {"prompt": ["completion"], "completion": ["prompt"]}.get("".join(exchange))
        missing = f'"{wanted[0]}"' if wanted else '"messages", or "prompt" and "completion"'
        hint = _suggest([name for name in row if name not in exchange], wanted or ["messages", "prompt", "completion"])
        raise DataError(f"{source}: the row lacks {missing}{hint}; a row is {LAYOUTS}")
    if "messages" in row and exchange:
        raise DataError(f'{source}: both "messages" and "{exchange[0]}" in one row; keep one of them')
    for name in MEANINGFUL:
        if row.get(name) is not None:
            hint = "make it the first of the messages" if name == "system" else "it is not supported; remove it"
            raise DataError(f'{source}: the field "{name}" would change what is trained; {hint}')
    if exchange:
        return [
            Message(role="user", content=_text(row["prompt"], '"prompt"', source)),
            Message(role="assistant", content=_text(row["completion"], '"completion"', source)),
        ]
    if not isinstance(row["messages"], list):
        raise DataError(f'{source}: "messages" is {_kind(row["messages"])}, but must be a list of messages')
    return [_message(item, f"message {place}", source) for place, item in enumerate(row["messages"], start=1)]


def _message(item: Any, name: str, source: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f'{source}: {name} is {_kind(item)}, but must be {{"role": ..., "content": ...}}')
    other = [field for field in item if field not in ("role", "content") and item[field] is not None]
    for field in ("role", "content"):
        if field not in item:
            raise DataError(f'{source}: {name} lacks "{field}"{_suggest(other, [field])}')
    if other:
        raise DataError(f'{source}: {name} has a field "{other[0]}"; the fields of a message are "role" and "content"')
    role = item["role"]
    if role not in ROLES:
        hint = _suggest([role], list(ROLES)) if isinstance(role, str) else ""
        raise DataError(f"{source}: {name} has the unknown role {role!r}{hint}; roles are {', '.join(ROLES)}")
    return Message(role=role, content=_text(item["content"], f"the content of {name}", source))


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: {name} is {_kind(value)}, but must be a string")
    if not value.strip():
        raise DataError(f"{source}: {name} is empty; fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"{source}: {name} has half a surrogate pair, {half!a}, which is no character") from None
    return value


def _in_order(messages: list[Message], source: str) -> list[Message]:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{source}: no assistant turn, so there is nothing to train; add the answer or remove the row")
    if "system" in roles[1:]:
        place = roles.index("system", 1) + 1
        raise DataError(f"{source}: message {place} is a system message; there may be one, and it comes first")
    for place, (before, role) in enumerate(zip([None, *roles], roles, strict=False), start=1):
        if role == "assistant" and before in (None, "system"):
            raise DataError(
                f"{source}: message {place} is the assistant's, but nothing was asked; put a user turn before"
            )
        if role == "assistant" and before == "assistant":
            raise DataError(f"{source}: messages {place - 1} and {place} are both the assistant's; join them into one")
    return messages


def _suggest(found: list[str], wanted: list[str]) -> str:
    """A remark for the message, when a name in ``found`` misspells or is a synonym of one in ``wanted``; or nothing."""
    for name in found:
        lowered = name.strip().lower()
        near = [_SYNONYMS[lowered]] if lowered in _SYNONYMS else difflib.get_close_matches(lowered, wanted, n=1)
        if near and near[0] in wanted:
            return f'; "{name}" should be "{near[0]}"'
    return ""


def _kind(value: Any) -> str:
    """What JSON calls the type of ``value``, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
