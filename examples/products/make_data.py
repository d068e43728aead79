"""Makes train.jsonl and heldout.jsonl: product attributes in, a description out.

    python examples/products/make_data.py [FOLDER]

The files go into FOLDER, or beside this script. Deterministic: the same script and vocabulary give the same bytes on
every machine. README.md says why the data is as it is.
"""

import json
import sys
from pathlib import Path
from random import Random

from catalogue import Entry, Product, names, products, wording
from grammar import words
from wording import Unfit, describe, pick, shuffled

TRAIN_ROWS, HELDOUT_ROWS = 1000, 120
SEED = 20250
REQUEST = "Write a product description."

# How likely a kind of attribute is chosen, against the others; what is not named here counts 1.
WEIGHTS = {
    "material": 4.0,
    "flavour": 5.0,
    "scent": 5.0,
    "feature": 4.0,
    "colour": 2.5,
    "audience": 2.0,
    "use": 2.0,
    "origin": 0.8,
}
MEASURES = 1.6  # sizes, weights, capacities and the like
LABELS = {"burntime": "burn time"}
# The share of prompts that list attributes as the description takes them up. A user may list them in any order.
KEEP_ORDER = 0.7


def choose_attributes(rng: Random, product: Product, count: int) -> list[Entry]:
    """Attributes that go together: no colour over bare wood, no dishwasher for what it would ruin.

    Args:
        rng: Where the choices come from.
        product: The type of product.
        count: How many attributes, besides name and type.

    Returns:
        Entries of as many different kinds.
    """
    options = {kind: list(entries) for kind, entries in product.entries.items()}
    if product.materials:
        material = pick(rng, product.materials)
        options["material"] = [material]
        if material.bare:
            options.pop("colour", None)
            options.pop("pattern", None)
        options["care"] = [entry for entry in product.care if entry.value in material.care]
    # A description of what a thing measures needs only one figure.
    measures = [
        kind for kind in options if kind not in WEIGHTS and kind not in {"care", "style", "guarantee", "pattern"}
    ]
    for kind in shuffled(rng, measures)[1:]:
        del options[kind]
    weights = {kind: WEIGHTS.get(kind, MEASURES if kind in measures else 1.0) for kind in options if options[kind]}
    chosen: list[Entry] = []
    while len(chosen) < count:
        point = rng.random() * sum(weights.values())
        for kind in list(weights):
            point -= weights[kind]
            if point < 0:
                chosen.append(pick(rng, options[kind]))
                del weights[kind]
                break
    return chosen


def prompt(name: str, product: Product, attributes: list[Entry]) -> str:
    """The user's turn: the request, then one attribute a line."""
    lines = [f"name: {name}", f"product: {product.type}"]
    lines += [f"{LABELS.get(entry.kind, entry.kind)}: {entry.value}" for entry in attributes]
    return "\n".join([REQUEST, *lines])


def make_rows(rng: Random, kinds: list[Product], count: int, free: list[str], taken: set[frozenset[str]]) -> list[str]:
    """Makes rows of one file.

    Args:
        rng: Where the choices come from.
        kinds: The types of product, each used about equally often.
        count: How many rows.
        free: Names to use; those used are removed.
        taken: Attribute combinations that are used up; those used are added.

    Returns:
        Lines of JSON, in random order.
    """
    templates = wording()
    rows: list[str] = []
    while len(rows) < count:
        product = kinds[len(rows) % len(kinds)]
        attributes = choose_attributes(rng, product, pick(rng, [2, 3, 3, 3, 4, 4]))
        combination = frozenset(f"{entry.kind}: {entry.value}" for entry in attributes)
        values = [word for entry in attributes for word in words(entry.value) if word != "and"]
        if combination in taken or len(set(values)) < len(values):  # "natural rubber" and a "rubber base"
            continue
        try:
            text, order = describe(rng, product, free[-1], attributes, templates)
        except Unfit:  # such as "letter writers" and "birthday letters", which no draft can avoid saying twice
            continue
        taken.add(combination)
        name = free.pop()
        listed = order if rng.random() < KEEP_ORDER else shuffled(rng, order)
        messages = [
            {"role": "user", "content": prompt(name, product, listed)},
            {"role": "assistant", "content": text},
        ]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return shuffled(rng, rows)


def build() -> dict[str, str]:
    """Makes both files.

    Returns:
        Their contents, by file name.
    """
    rng = Random(SEED)
    everything = products()
    free = shuffled(rng, names())
    taken: set[frozenset[str]] = set()
    # The held-out rows come first, so that they stay the same when somebody changes the number of training rows.
    heldout = make_rows(rng, [product for product in everything if product.heldout], HELDOUT_ROWS, free, taken)
    train = make_rows(rng, [product for product in everything if not product.heldout], TRAIN_ROWS, free, taken)
    return {"train.jsonl": "\n".join(train) + "\n", "heldout.jsonl": "\n".join(heldout) + "\n"}


def main(folder: Path) -> None:
    """Writes both files into a folder."""
    for name, content in build().items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
        print(f"{name}: {content.count(chr(10))} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
