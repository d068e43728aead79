"""An adapter exported for llama.cpp from the command line: what is said, and what is refused."""

import json
from pathlib import Path

import pytest

from lorafit.cli import main
from lorafit.config import LoRA
from tests.merging.runs import write_run
from tests.oracles.tiny_gguf import write_tiny_llama


@pytest.fixture
def run(tmp_path: Path) -> str:
    base = write_tiny_llama(tmp_path / "base.gguf").path
    return str(write_run(tmp_path / "run", base, LoRA(rank=2, alpha=4.0)))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["export", *words, "--format", "gguf-lora"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_it_says_what_was_measured(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out.gguf")
    assert main(["export", run, output, "--format", "gguf-lora"]) == 0
    said = capsys.readouterr().out
    document = json.loads(Path(f"{output}.certificate.json").read_text())
    losses = document["held_out"]
    assert "14 of rank 2; alpha 4" in said
    assert f"{losses['run_loss']:.4f} for the run and {losses['file_loss']:.4f} for base and file" in said
    assert f"{document['llamacpp']['answers']['merged_loss']:.3f} with the adapter" in said
    assert f"llama-cli -m base.gguf --lora {output}" in said
    assert main(["export", run, output, "--format", "gguf-lora", "--dtype", "fp16", "--overwrite", "--json"]) == 0
    captured = capsys.readouterr()
    assert "rounding of the adapter to F16" in captured.err
    assert json.loads(captured.out) == json.loads(Path(f"{output}.certificate.json").read_text())


def test_what_is_refused(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.gguf"
    before = base.read_bytes()
    assert "the name must end in .gguf" in refused(capsys, run, str(tmp_path / "out"))
    assert "is no run or adapter" in refused(capsys, str(base), str(tmp_path / "out.gguf"))
    assert "exists; choose another name" in refused(capsys, run, str(base))
    assert "is not what an export wrote" in refused(capsys, run, str(base), "--overwrite")
    assert "has --dtype fp32, fp16, not bf16" in refused(capsys, run, str(tmp_path / "out.gguf"), "--dtype", "bf16")
    assert base.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "run"}
