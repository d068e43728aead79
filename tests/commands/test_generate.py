"""Generate and chat: what they print is the model's answer to what was said, and nothing else."""

import io

import pytest

from lorafit.cli import main
from lorafit.data.readers import Message
from lorafit.evaluation.generate import generate
from lorafit.models.load import load

OPTIONS = ("--max-tokens", "6")


def answer(model: str, *turns: str, temperature: float = 0.0, seed: int = 0) -> str:
    loaded, tokenizer = load(model)
    messages = [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]
    return "".join(generate(loaded, tokenizer, messages, max_tokens=6, temperature=temperature, seed=seed))


def test_generate_prints_the_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "The cat", *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert captured.out == answer(model, "The cat") + "\n"
    assert captured.err == ""


def test_generate_samples_under_its_seed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        assert main(["generate", model, "The cat", *OPTIONS, "--temperature", "1", "--seed", str(seed)]) == 0
    expected = [answer(model, "The cat", temperature=1.0, seed=seed) + "\n" for seed in (1, 2)]
    assert expected[0] != expected[1]
    assert capsys.readouterr().out == "".join(expected)


def test_generate_reads_the_prompt_from_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    assert main(["generate", model, "-", *OPTIONS]) == 0
    assert capsys.readouterr().out == answer(model, "two\nlines") + "\n"


def test_base_is_refused_where_there_is_no_adapter(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "The cat", "--base"]) == 2
    assert capsys.readouterr().err.startswith("error: --base switches a run's adapter off")


def test_chat_remembers_until_reset(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nThe mill\n/reset\nThe cat\n/nonsense\n"))
    assert main(["chat", model, *OPTIONS]) == 0
    first = answer(model, "The cat")
    second = answer(model, "The cat", first, "The mill")
    assert second != answer(model, "The mill")
    out = capsys.readouterr().out
    assert f"> {first}\n> {second}\n> The conversation is forgotten.\n> {first}\n> There is no /nonsense." in out


def test_chat_goes_on_when_the_context_is_full(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'cat ' * 200}\nThe cat\n"))
    assert main(["chat", model, *OPTIONS]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the model's context is 128; shorten it; /reset starts anew" in out
    assert " ".join(answer(model, "The cat").split()) in out
