"""Rows of a task so simple that a tiny model learns some of it in a few steps."""

import json
from pathlib import Path

_WORDS = (
    "miller", "son", "mill", "donkey", "cat", "brother", "boots", "people",
    "door", "sack", "corn", "string", "legs", "man", "fur", "skin",
)  # fmt: skip


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Different questions, with answers that follow from them."""
    things = [(_WORDS[i % 16], _WORDS[(i // 16 + 5 * i + 1) % 16]) for i in range(first, first + count)]
    return [
        {"prompt": f"Who was with the {one}, {i}?", "completion": f"The {one} was with the {other}."}
        for i, (one, other) in enumerate(things, first)
    ]


def write_rows(path: Path, count: int, first: int = 0) -> str:
    """Write rows as JSON lines; returns the path as users give it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, first)), encoding="utf-8")
    return str(path)
