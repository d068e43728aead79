"""Preview: which text is trained, as the chat template has it, and which rows are too long."""

import json

import pytest

from lorafit.cli import main
from lorafit.containers.gguf import GGUFFile
from lorafit.data.chat import encode
from lorafit.data.readers import read_examples
from lorafit.models.tokenizer import tokenizer_from_gguf


def test_preview_tells_what_is_trained_and_what_is_too_long(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_from_gguf(GGUFFile.open(model))
    counts = [len(encode(example, tokenizer).tokens) for example in read_examples(data)]
    limit = sorted(counts)[1]
    assert main(["preview", model, data, "--rows", "1", "--max-length", str(limit), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["rows"][f"{data}:1"] == [
        {"text": "<|im_start|>user\nWhat did he leave?<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "A cat.<|im_end|>", "trained": True},
        {"text": "\n", "trained": False},
    ]
    assert document["too_long"] == [f"{data}:{row}" for row, count in enumerate(counts, start=1) if count > limit]
    assert document["lengths"]["total"] == sum(counts)
    assert "«A cat.<|im_end|>»" in captured.err


def test_preview_without_json_prints_text(model: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", model, data]) == 0
    captured = capsys.readouterr()
    assert "No row is longer than 128 tokens" in captured.out
    assert captured.err == ""
