"""Which rows each step of a measurement trains on.

    python benchmarks/peers/rows.py PLAN MODEL STEPS SEED [DATA.jsonl]

Rows are drawn from DATA, or made up: "long" documents of 200 to 1,000 tokens, conversations about several products of
the example in examples/products. They are grouped by length into batches of 8, which is what TRL needs in order to pad
little (lorafit does not pad), and the batches are shuffled.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from lorafit.data.chat import Document, encode_all
from lorafit.data.readers import Example, read_examples
from lorafit.models.load import load

BATCH = 8
PRODUCTS = Path(__file__).resolve().parents[2] / "examples" / "products" / "train.jsonl"
SHORTEST, LONGEST = 200, 1000
MOST_PRODUCTS = 9


def main(plan: Path, model: str, steps: int, seed: int, data: Path | None = None) -> None:
    """Write the plan."""
    _, tokenizer = load(model)
    draw, count = random.Random(seed), steps * BATCH
    if data:
        documents = encode_all(draw.sample(read_examples(data), count), tokenizer)
    else:
        # More than enough, since some are too short or too long.
        fitting = [
            document
            for document in encode_all(long_conversations(draw, 2 * count), tokenizer)
            if SHORTEST <= len(document.tokens) <= LONGEST
        ]
        documents = fitting[:count]
        assert len(documents) == count
    plan.write_text(json.dumps([[_as_dict(document) for document in batch] for batch in batches(documents, draw)]))


def long_conversations(draw: random.Random, count: int) -> list[Example]:
    """Conversations in which descriptions of two or more products are asked for, one after the other."""
    rows = read_examples(PRODUCTS)
    conversations = []
    for number in range(count):
        chosen = draw.sample(rows, draw.randint(2, MOST_PRODUCTS))
        messages = tuple(message for row in chosen for message in row.messages)
        conversations.append(Example(messages, f"conversation {number + 1}"))
    return conversations


def batches(documents: list[Document], draw: random.Random) -> list[list[Document]]:
    """Documents of like length together, in random order."""
    ordered = sorted(documents, key=lambda document: len(document.tokens))
    grouped = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    draw.shuffle(grouped)
    return grouped


def _as_dict(document: Document) -> dict[str, list[int] | list[bool]]:
    return {"tokens": document.tokens, "trained": document.trained}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *map(Path, sys.argv[5:]))
