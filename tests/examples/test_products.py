"""The product descriptions: the committed rows are what the script makes, and they are worth training on."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "products"
FILES = ("train.jsonl", "heldout.jsonl")


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("products_measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()] for name in FILES}


def turns(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def listed(row: dict) -> dict[str, str]:
    first, *lines = turns(row)[0].split("\n")
    assert first == "Write a product description."
    return dict(line.split(": ") for line in lines)


def values(row: dict) -> frozenset[tuple[str, str]]:
    """What makes the attribute combination of a row: all but its name and its type."""
    return frozenset(pair for pair in listed(row).items() if pair[0] not in ("name", "product"))


def test_script_reproduces_the_committed_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "make_data.py", tmp_path], check=True, capture_output=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_there_are_enough_rows_of_four_to_six_attributes(rows: dict[str, list[dict]]) -> None:
    assert len(rows["train.jsonl"]) >= 800
    assert len(rows["heldout.jsonl"]) >= 100
    for row in rows["train.jsonl"] + rows["heldout.jsonl"]:
        assert 4 <= len(listed(row)) <= 6
        assert all(1 <= len(value.split()) <= 6 for value in listed(row).values())


def test_held_out_products_are_new(rows: dict[str, list[dict]]) -> None:
    train, heldout = rows["train.jsonl"], rows["heldout.jsonl"]
    text = "\n".join("\n".join(turns(row)) for row in train).lower()
    for row in heldout:
        # Not even as a word in another product's description.
        assert listed(row)["product"] not in text
    assert {values(row) for row in train}.isdisjoint(values(row) for row in heldout)


def test_every_name_and_combination_is_used_once(rows: dict[str, list[dict]]) -> None:
    both = rows["train.jsonl"] + rows["heldout.jsonl"]
    assert len({listed(row)["name"] for row in both}) == len(both)
    assert len({values(row) for row in both}) == len(both)
    assert len({turns(row)[1] for row in both}) == len(both)


def test_every_value_stands_in_the_answer(rows: dict[str, list[dict]], measure: ModuleType) -> None:
    for row in rows["train.jsonl"] + rows["heldout.jsonl"]:
        prompt, answer = turns(row)
        for value in listed(row).values():
            assert value.lower() in answer.lower(), (value, answer)
        assert measure.attribute_coverage(prompt, answer) == 1


def test_answers_are_short_and_tidy(rows: dict[str, list[dict]]) -> None:
    for row in rows["train.jsonl"] + rows["heldout.jsonl"]:
        answer = turns(row)[1]
        assert 40 <= len(answer.split()) <= 85
        assert 2 <= len(re.findall(r"[.?!](?= |$)", answer)) <= 4
        assert re.fullmatch(r"[A-Z0-9].*[.?]", answer)
        assert not re.search(r"[{}\[\]|+*]|  | [.,;:?]|[.?!] [a-z]|[.?]\.", answer), answer
        assert not re.search(r"\b(\w+) \1\b", answer), answer
        assert not re.search(r"(?i)\ba (?!eu|one)[aeio]|\ban [bcdfgj-np-tv-z]", answer), answer


def test_a_memorised_template_would_not_help(rows: dict[str, list[dict]], measure: ModuleType) -> None:
    train = [turns(row)[1] for row in rows["train.jsonl"]]
    heldout = [turns(row)[1] for row in rows["heldout.jsonl"]]
    # Measured 3.2%; the demo's bound for what a model generates is 20%, so that leaves it most of the room.
    assert measure.ngram_overlap(heldout, rows["train.jsonl"]) < 0.06
    phrases = Counter(phrase for text in train for phrase in set(measure.ngrams(text, 8)))
    assert phrases.most_common(1)[0][1] <= 0.015 * len(train)
    openings = Counter(" ".join(text.split()[:3]) for text in train)
    assert openings.most_common(1)[0][1] <= 0.06 * len(train)
    # Many kinds of things, each with a say: nothing below a dozen categories could give that many types.
    assert len({listed(row)["product"] for row in rows["train.jsonl"]}) >= 90
    assert len({pair for row in rows["train.jsonl"] for pair in values(row)}) >= 700


def test_readme_shows_a_row_that_exists(rows: dict[str, list[dict]]) -> None:
    text = (FOLDER / "README.md").read_text("utf-8").replace("\n> ", " ")
    assert any(all(turn in text for turn in turns(row)) for row in rows["heldout.jsonl"])


def test_attribute_coverage_by_hand(measure: ModuleType) -> None:
    prompt = "Write a product description.\nname: Fennick\nproduct: bread bin\nmaterial: olive wood\ncolour: sand"
    assert measure.attribute_coverage(prompt, "The Fennick bread bin in Olive Wood.") == 3 / 4
    assert measure.attribute_coverage(prompt, "The Fennick bin for bread, of olive  wood, sand.") == 2 / 4
    assert measure.attribute_coverage(prompt, "") == 0
    assert measure.attribute_coverage("Hello there", "Hello") == 1


def test_ngram_overlap_by_hand(measure: ModuleType) -> None:
    training = [{"messages": [{"role": "user", "content": "x y z w"}, {"role": "assistant", "content": "A b, c d!"}]}]
    # Three-word runs of "a b c d": abc and bcd. Of "a b c x": abc is known, bcx is not.
    assert measure.ngram_overlap(["a B c x"], training, n=3) == 1 / 2
    # Occurrences count, over all texts together: abc abc | bcd of five runs, then one unknown of one.
    assert measure.ngram_overlap(["a b c a b c"], training, n=3) == 2 / 4
    assert measure.ngram_overlap(["a b c d", "q r s"], training, n=3) == 2 / 3
    # The user's turn is not what a description could be copied from, and a phrase never spans two rows.
    assert measure.ngram_overlap(["x y z w"], training, n=3) == 0
    assert measure.ngram_overlap(["c d a"], training * 2, n=3) == 0
    assert measure.ngram_overlap(["a b"], training, n=3) == 0
    assert measure.ngram_overlap(["one two three four five six seven eight"], training) == 0


def test_measure_prints_both_figures() -> None:
    command = [sys.executable, str(FOLDER / "measure.py"), str(FOLDER / "heldout.jsonl")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "attribute values mentioned: 100.0%" in printed
    assert re.search(r"stand in the training rows: [0-5]\.\d%", printed)
