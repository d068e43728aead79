"""Reads the vocabulary: which products there are, and which attributes with which benefits each of them can have.

Every file in vocabulary/ whose name starts with a letter is a category; ``_materials.toml`` and ``_shared.toml`` hold
what categories share, and the other three how things are said. An entry is one string, "value | phrase | phrase", so
that the files stay easy to read and to extend for somebody who does not program.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = Path(__file__).parent / "vocabulary"

# The keys under which a product lists its own values, in the wording's name for the kind of attribute.
OWN_KINDS = (
    "feature", "use", "flavour", "capacity", "volume", "size", "width", "height", "length", "weight", "battery",
    "brightness", "burntime", "set", "contents", "pack",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One value that an attribute can have.

    Attributes:
        kind: The kind of attribute, such as "material".
        value: The value, as it stands in the prompt and in the description.
        phrases: What can be said of it; how these are used depends on the kind.
        made: For a material, the ways to introduce it ("woven from").
        bare: For a material, whether it keeps its natural colour, so that no colour goes with it.
        care: For a material, how it may be cleaned.
    """

    kind: str
    value: str
    phrases: tuple[str, ...]
    made: tuple[str, ...] = ()
    bare: bool = False
    care: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Product:
    """A type of product, and everything that can be said of one.

    Attributes:
        type: Its name, such as "bread bin".
        number: "one", "plural" (gloves) or "mass" (granola).
        heldout: Whether it is kept for the held-out rows.
        promises: What it does for its owner, as phrases in the base form; one that starts with "*" is
            something that only the product does, and never its owner.
        hooks: Sentences to open with.
        materials: The materials that it can be made from; empty where that makes no sense.
        care: The ways to clean it that suit the type, whatever it is made from.
        entries: All other values, by kind.
    """

    type: str
    number: str
    heldout: bool
    promises: tuple[str, ...]
    hooks: tuple[str, ...]
    materials: tuple[Entry, ...]
    care: tuple[Entry, ...]
    entries: dict[str, tuple[Entry, ...]] = field(hash=False)


def _entry(kind: str, text: str, **more: Any) -> Entry:
    value, *phrases = (part.strip() for part in text.split("|"))
    return Entry(kind, value, tuple(phrases), **more)


def _read(name: str) -> dict[str, Any]:
    with (VOCABULARY / name).open("rb") as file:
        return tomllib.load(file)


def wording() -> dict[str, Any]:
    """All templates: "kinds" (by kind of attribute, then form) and "sentences" (by place in the description)."""
    kinds = _read("_kinds.toml")["kinds"] | _read("_measures.toml")["kinds"]
    return {"kinds": kinds, "sentences": _read("_sentences.toml")}


def products() -> list[Product]:
    """All types of product, in the order of the files.

    Returns:
        The products of every category, held-out ones included.
    """
    shared = _read("_shared.toml")
    materials = {
        entry.value: entry
        for group in _read("_materials.toml")["materials"]
        for text in group["values"]
        for entry in [
            _entry(
                "material",
                text,
                made=tuple(group["made"]),
                bare=group.get("bare", False),
                care=frozenset(group["care"]),
            )
        ]
    }
    colours = tuple(
        Entry("colour", value, tuple(group["phrases"])) for group in shared["colours"] for value in group["values"]
    )
    kinds = {"care": "care", "style": "styles", "origin": "origins", "guarantee": "guarantees"}
    kinds |= {"pattern": "patterns", "scent": "scents"}
    common = {kind: tuple(_entry(kind, text) for text in shared[section]["values"]) for kind, section in kinds.items()}

    found = []
    for path in sorted(VOCABULARY.glob("[a-z]*.toml")):
        category = _read(path.name)
        audience = tuple(_entry("audience", text) for text in category["audience"])
        for row in category["product"]:
            entries = {"audience": audience}
            for kind in [*category["shared"], *row.get("shared", [])]:
                allowed = category.get(kinds[kind])
                entries[kind] = tuple(entry for entry in common[kind] if allowed is None or entry.value in allowed)
            entries |= {kind: tuple(_entry(kind, text) for text in row[kind]) for kind in OWN_KINDS if kind in row}
            if "flavour" not in row and "scent" not in row.get("shared", []):
                entries["colour"] = colours
            found.append(
                Product(
                    type=row["type"],
                    number=row.get("number", "one"),
                    heldout=row.get("heldout", False),
                    promises=tuple(row["promise"]),
                    hooks=tuple(row["hook"]),
                    materials=tuple(materials[name] for name in row.get("material", [])),
                    care=tuple(entry for entry in common["care"] if entry.value in row.get("care", [])),
                    entries=entries,
                )
            )
    return found


def names() -> list[str]:
    """All invented product names, in a fixed order, without those that are somebody's."""
    parts = {key: text.split() for key, text in _read("_names.toml").items()}
    made = (first + last for first in parts["first"] for last in parts["last"] if first[-1] != last[0])
    return [name for name in made if name not in parts["taken"]]
