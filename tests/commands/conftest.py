"""A model and a data set that commands are tried on."""

import json

import pytest

from tests.oracles.tiny_gguf import write_tiny_llama

# The rows of `data`: question, answer.
ROWS = (
    ("What did he leave?", "A cat."),
    ("And the eldest?", "He took the mill."),
    ("Who spoke?", "The cat, of course."),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_llama(path, context=128)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in ROWS))
    return str(path)
