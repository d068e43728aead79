"""How good are generated descriptions? Two measures that need nothing but the text.

    python examples/products/measure.py GENERATED.jsonl

GENERATED.jsonl holds rows like those of heldout.jsonl, with a generated answer in place of the reference. The script
prints the share of attribute values that the answers mention (higher is better) and the share of their phrases of
eight words that stand in the training rows (lower is better: a model that memorised a template scores high).
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

Row: TypeAlias = dict[str, list[dict[str, str]]]


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def content(row: Row, role: str) -> str:
    """What the given role says in a row, all its turns in order."""
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == role)


def attributes(prompt: str) -> dict[str, str]:
    """The attributes that a prompt lists, one "name: value" a line; other lines are skipped."""
    pairs = (line.split(":", 1) for line in prompt.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def attribute_coverage(prompt: str, text: str) -> float:
    """The share of the attribute values in a prompt that a text mentions.

    Args:
        prompt: The user's turn, one "name: value" a line.
        text: The description.

    Returns:
        Between 0 and 1; a value counts when it stands in the text exactly, but for upper and lower case. 1 for a
        prompt without attributes.
    """
    values = attributes(prompt).values()
    return sum(value.lower() in text.lower() for value in values) / len(values) if values else 1.0


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words of a text; case and punctuation do not count."""
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
    return (tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def ngram_overlap(texts: Iterable[str], training_rows: Iterable[Row], n: int = 8) -> float:
    """The share of the phrases of n words in some texts that stand in the answers of training rows.

    Args:
        texts: The generated descriptions. Each occurrence of a phrase counts.
        training_rows: Rows with "messages", of which the assistant's turns are searched.
        n: Words in a phrase.

    Returns:
        Between 0 and 1; 0 when no text has n words.
    """
    known = {phrase for row in training_rows for phrase in ngrams(content(row, "assistant"), n)}
    found = [phrase in known for text in texts for phrase in ngrams(text, n)]
    return sum(found) / len(found) if found else 0.0


def main(path: str) -> None:
    """Prints both measures of the generated rows in a file."""
    rows = read_rows(Path(path))
    if not rows:
        sys.exit(f"{path}: no rows; give a file of generated descriptions")
    training = read_rows(Path(__file__).parent / "train.jsonl")
    coverage = sum(attribute_coverage(content(row, "user"), content(row, "assistant")) for row in rows) / len(rows)
    overlap = ngram_overlap((content(row, "assistant") for row in rows), training)
    print(f"{len(rows)} descriptions")
    print(f"attribute values mentioned: {coverage:.1%}")
    print(f"phrases of 8 words that stand in the training rows: {overlap:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/products/measure.py GENERATED.jsonl")
    main(sys.argv[1])
