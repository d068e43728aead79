"""Export from the command line: what it says, and what it refuses to write over."""

import json
from pathlib import Path

import pytest

from lorafit.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["export", *words, "--format", "safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_it_says_what_was_proved(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    assert main(["export", model, output, "--format", "safetensors"]) == 0
    said = capsys.readouterr().out
    assert "every weight is the one that the blocks stand for, to the last bit" in said
    assert "tiny.gguf, SHA-256 " in said
    assert main(["export", model, output, "--format", "safetensors", "--dtype", "bf16", "--overwrite", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads(Path(f"{output}.certificate.json").read_text())
    assert f"rounded to bfloat16, by {document['largest_difference']:.3g} at most" in captured.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.certificate.json"}


def test_nothing_is_written_over(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    assert main(["export", model, output, "--format", "safetensors"]) == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "out exists; choose another name, or replace it with --overwrite" in refused(capsys, model, output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    mine = str(tmp_path / "mine")
    assert "is not what an export wrote, so it is not replaced" in refused(capsys, model, mine, "--overwrite")
    (tmp_path / "file").write_text("a file")
    assert "file is in the way" in refused(capsys, model, str(tmp_path / "file"), "--overwrite")
    (tmp_path / "proof.certificate.json").write_text("{}")
    assert "proof.certificate.json exists" in refused(capsys, model, str(tmp_path / "proof"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert main(["export", model, str(tmp_path / "empty"), "--format", "safetensors"]) == 0


def test_what_cannot_be_exported(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert "is a run, and export takes a base" in refused(capsys, str(tmp_path / "run"), str(tmp_path / "out"))
    assert main(["export", model, str(tmp_path / "dense"), "--format", "safetensors"]) == 0
    capsys.readouterr()
    again = refused(capsys, str(tmp_path / "dense"), str(tmp_path / "out"))
    assert "holds unpacked safetensors already, so there is nothing to export" in again
    assert "no such model" in refused(capsys, str(tmp_path / "gone.gguf"), str(tmp_path / "out"))
    assert main(["export", model, str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_written_over_itself(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that is exported lies in an earlier export of it."""
    assert main(["export", model, str(tmp_path / "out"), "--format", "safetensors"]) == 0
    inside = tmp_path / "out" / "tiny.gguf"
    inside.write_bytes(Path(model).read_bytes())
    capsys.readouterr()
    assert "holds the model that is exported" in refused(capsys, str(inside), str(tmp_path / "out"), "--overwrite")
    assert inside.is_file()
