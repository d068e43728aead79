"""Evaluate: examples in the prompt change what the base knows, and never what is measured."""

import json
from pathlib import Path

import pytest

from lorafit.cli import main
from lorafit.commands.evaluate import _with_shots, evaluate
from lorafit.containers.gguf import GGUFFile
from lorafit.data.chat import encode
from lorafit.data.readers import Example, Message
from lorafit.errors import ConfigError, DataError, ModelError
from lorafit.models.tokenizer import tokenizer_from_gguf
from tests.commands.conftest import ROWS
from tests.oracles.tiny_directory import write_tiny_directory


def test_shots_stand_before_the_question_and_do_not_count(model: str) -> None:
    tokenizer = tokenizer_from_gguf(GGUFFile.open(model))

    def turns(*rows: tuple[str, str]) -> tuple[Message, ...]:
        return tuple(
            Message(role=role, content=text)
            for row in rows
            for role, text in zip(("user", "assistant"), row, strict=True)
        )

    system = Message(role="system", content="Tell it.")
    shots = [Example((Message(role="system", content="Other."), *turns(row)), "shots:1") for row in ROWS[:2]]
    # Two answers of its own: both count, and none of the shots'.
    question = Example((system, *turns(ROWS[2], ROWS[0])), "data:1")
    own = sum(encode(question, tokenizer).trained)
    document = _with_shots(question, shots, own, tokenizer)
    conversation = [system, *turns(*ROWS[:2], ROWS[2], ROWS[0])]
    assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(conversation, tokenize=False)
    counted = [token for token, counts in zip(document.tokens, document.trained, strict=True) if counts]
    assert tokenizer.decode(counted) == "The cat, of course.<|im_end|>A cat.<|im_end|>"


def test_evaluate_measures_the_same_answers_with_and_without_shots(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", model, data, "--shots", "1", "--shots-from", data, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["model", "data", "base", "base + 1 shots"]
    assert document["base"]["tokens"] == document["base + 1 shots"]["tokens"] > 0
    assert document["base"]["loss"] != document["base + 1 shots"]["loss"]


def test_evaluate_refuses_what_cannot_be_measured(model: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shots N and --shots-from FILE go together"):
        evaluate(model, data, shots=1)
    with pytest.raises(ConfigError, match=r"--shots is 9, but .* has 3 rows"):
        evaluate(model, data, shots=9, shots_from=data)
    with pytest.raises(DataError, match=r"rows.jsonl:1: \d+ tokens, but the model's context is 128.*fewer --shots"):
        evaluate(model, data, shots=3, shots_from=data)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "cat " * 200, "completion": "Yes."}))
    with pytest.raises(DataError, match=r"long.jsonl:1: \d+ tokens"):
        evaluate(model, str(long))


def test_a_model_that_computes_no_numbers_is_an_error(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are finite, and their products are not."""
    dense = write_tiny_directory(tmp_path / "model")
    for name, parameter in dense.named_parameters():
        if "mlp" in name:
            parameter.data *= 1e25
    dense.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model: the loss on .*, base, is nan: its weights are damaged or too large"):
        evaluate(str(tmp_path / "model"), data)
    assert main(["generate", str(tmp_path / "model"), "Hello"]) == 2
    assert "the model computes what is not a number" in capsys.readouterr().err
