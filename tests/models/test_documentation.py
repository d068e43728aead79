"""docs/models.md against the tables."""

import re
from pathlib import Path

from lorafit.models.families import FAMILIES
from lorafit.models.pretokenizers import FAMILY_BY_NAME

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_families_are_those_of_the_tables() -> None:
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("|")]
    listed = {(row[2].strip(), row[3].strip()) for row in rows if len(row) == 6} - {
        ("GGUF architecture", "transformers")
    }
    listed = {pair for pair in listed if set(pair[0]) != {"-"}}
    assert listed == {(family.architecture, family.model_type) for family in FAMILIES}


def test_the_number_of_pre_tokenisers() -> None:
    (number,) = re.findall(r"with (\d+) names of pre-tokenisers", TEXT)
    assert int(number) == len(FAMILY_BY_NAME)
