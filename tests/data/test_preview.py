"""The preview's numbers by hand, and its pieces against the text that was encoded."""

from pathlib import Path

import pytest

from lorafit.containers.gguf import GGUFFile
from lorafit.data.chat import Document, encode
from lorafit.data.preview import Lengths, Piece, lengths, pieces, too_long
from lorafit.data.readers import Example, Message
from lorafit.models.tokenizer import tokenizer_from_gguf
from tests.oracles.tiny_gguf import write_tiny_llama


def document(length: int, trained: int) -> Document:
    return Document([7] * length, [False] * (length - trained) + [True] * trained, f"rows.jsonl:{length}")


def test_lengths_by_nearest_rank() -> None:
    rows = [document(length, 2) for length in range(100, 0, -5)]  # 5, 10, ..., 100
    assert lengths(rows) == Lengths(rows=20, min=5, median=50, p95=95, max=100, total=1050, trained=40)
    assert lengths([document(3, 1)]) == Lengths(rows=1, min=3, median=3, p95=3, max=3, total=3, trained=1)


def test_too_long_keeps_order_and_allows_the_limit() -> None:
    rows = [document(9, 1), document(5, 1), document(6, 1)]
    assert [row.source for row in too_long(rows, 5)] == ["rows.jsonl:9", "rows.jsonl:6"]
    assert too_long(rows, 9) == []


@pytest.mark.parametrize("answer", ["fine", "日本 👩‍👩‍👧", " \n two"])
def test_pieces_are_the_text_with_what_is_trained(tmp_path: Path, answer: str) -> None:
    tokenizer = tokenizer_from_gguf(GGUFFile.open(write_tiny_llama(tmp_path / "tiny.gguf").path))
    messages = (Message(role="user", content="How é?"), Message(role="assistant", content=answer))
    assert pieces(encode(Example(messages, "x"), tokenizer), tokenizer) == [
        Piece("<|im_start|>user\nHow é?<|im_end|>\n<|im_start|>assistant\n", False),
        Piece(f"{answer}<|im_end|>", True),
        Piece("\n", False),
    ]
