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


def test_a_gguf_file_says_what_became_of_the_weights(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.gguf")
    words = ["export", model, output, "--format", "gguf", "--type"]
    assert main([*words, "q5_1", "--eval-data", data, "--certificate-tolerance", "9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "this quantises a second time what comes from tiny.gguf (Q4_1)" in said
    assert "are the model's to the last bit" in said
    assert "1 Q8_0 instead of Q6_K: their rows are no whole number of blocks" in said
    assert "for the file (" in said
    assert main([*words, "fp16", "--overwrite", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads(Path(f"{output}.certificate.json").read_text())
    assert document["type"] == "f16"
    assert "once, to f16; each of 20 tensors is exactly that" in " ".join(captured.err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "out.gguf.certificate.json"}
    assert main([*words, "q2_k"]) == 2
    capsys.readouterr()
    assert main(["export", model, str(tmp_path / "x"), "--format", "safetensors", "--eval-data", data]) == 2
    assert "--eval-data has no effect on --format safetensors" in capsys.readouterr().err
