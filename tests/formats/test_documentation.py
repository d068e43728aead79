"""docs/formats.md against the code."""

import re
from pathlib import Path

from lorafit.formats import FORMATS, PROMOTED, bits_per_weight
from lorafit.models.quantizing import BLOCK_FORMATS
from tests.oracles.blocks import random_blocks

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def tables() -> list[list[list[str]]]:
    """Each table of the page: its rows without the two of the head, cells without marks."""
    found: list[list[list[str]]] = [[]]
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def bits(name: str) -> float:
    blocks, constants = random_blocks(name, 576, 1536 // FORMATS[name].elements)
    return bits_per_weight(blocks, name, constants)


def test_every_format_stands_in_the_table_with_its_measured_size() -> None:
    rows = {row[0]: row for row in tables()[0]}
    assert set(rows) == set(FORMATS)
    assert {name: row[1] for name, row in rows.items()} == {name: f"{bits(name):.3f}" for name in FORMATS}


def test_what_can_be_trained_and_merged_is_what_has_offsets_or_gets_them() -> None:
    for name, _, _, lora, qalora, merge, *_ in tables()[0]:
        if name in PROMOTED:
            expected = (f"as {PROMOTED[name]}", f"yes, as {PROMOTED[name]}")
        else:
            expected = ("yes", "yes") if FORMATS[name].offset_at is not None else ("no", "no")
        assert (qalora, merge) == expected, name
        assert lora == "yes"


def test_what_is_written_and_how() -> None:
    written = {row[0]: row[6] for row in tables()[0]}
    assert {name for name, how in written.items() if how == "no"} == {
        name for name, block in FORMATS.items() if block.pack is None
    }
    searched = {row[0] for row in tables()[2]}
    assert {name for name, how in written.items() if how == "searched"} == searched


def test_where_formats_come_from() -> None:
    for name, _, origin, *_ in tables()[0]:
        in_files = FORMATS[name].type_id is not None
        assert ("GGUF" if in_files else "bitsandbytes") in origin, name
        said = set(re.findall(r"--quantize (\w+)", origin))
        assert said == {how for how, format_name in BLOCK_FORMATS.items() if format_name == name}


def test_promotions_stand_in_their_table() -> None:
    rows = tables()[1]
    assert {row[0]: row[1] for row in rows} == PROMOTED
    assert [row[2] for row in rows] == [
        f"{bits(source):.1f} to {bits(target):.1f}" for source, target in PROMOTED.items()
    ]
