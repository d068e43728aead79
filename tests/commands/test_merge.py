"""Merge as a command: files that appear whole or not at all, and what is said about them."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.cli import main
from lorafit.commands.merge import merge
from lorafit.config import LoRA, QALoRA
from lorafit.errors import MergeError, OutputExistsError
from tests.merging.runs import claim_to_be_a_part, write_run
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs") / "run", Path(model), held_out=False))


@pytest.fixture(scope="module")
def measured_run(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs") / "measured", Path(model)))


@pytest.fixture(scope="module")
def lora_run(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs") / "lora", Path(model), LoRA(rank=2), held_out=False))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_file_and_certificate_appear_and_nothing_else(
    run: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(model).read_bytes()
    certificate = merge(run, str(tmp_path / "new" / "tuned.gguf"))
    assert names(tmp_path / "new") == {"tuned.gguf", "tuned.gguf.certificate.json"}
    assert json.loads((tmp_path / "new/tuned.gguf.certificate.json").read_text()) == certificate.as_dict()
    data = (tmp_path / "new/tuned.gguf").read_bytes()
    assert certificate.merged.sha256 == hashlib.sha256(data).hexdigest()
    assert certificate.base.sha256 == hashlib.sha256(base).hexdigest()
    assert Path(model).read_bytes() == base
    assert capsys.readouterr() == ("", "")


def test_json_is_the_certificate_and_people_get_text(
    measured_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my model.gguf"
    assert main(["merge", measured_run, str(output), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads(Path(f"{output}.certificate.json").read_text())
    losses = document["held_out"]
    for text in (
        "bit-identical to those trained",
        f"{document['weights']['bytes_changed']:,} differ from tiny.gguf, all in offsets",
        f"{losses['run_loss']:.4f} for the run and {losses['merged_loss']:.4f} for the file",
        f"{document['llamacpp']['answers']['base_loss']:.3f} base",
        f"{document['llamacpp']['answers']['merged_loss']:.3f} merged",
        document["merged"]["sha256"],
        f"llama-cli -m '{output}'",
        "ollama create 'my model'",
        f"{output}.certificate.json",
        "And the cat?",
    ):
        assert text in captured.err, text


def test_what_was_not_measured_is_said(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", run, str(tmp_path / "tuned.gguf")]) == 0
    text = capsys.readouterr().out
    assert text.count("not measured: the run held no rows out") == 2
    assert "loads the file and runs it" in text


def test_an_existing_output_is_replaced_only_when_asked(run: str, tmp_path: Path) -> None:
    output, proof = tmp_path / "tuned.gguf", tmp_path / "tuned.gguf.certificate.json"
    for taken in (output, proof):
        taken.write_text("older")
        with pytest.raises(OutputExistsError, match=f"{taken.name} exists; .*--overwrite"):
            merge(run, str(output))
        assert taken.read_text() == "older"
        assert names(tmp_path) == {taken.name}
        taken.unlink()
    output.write_text("older")
    certificate = merge(run, str(output), overwrite=True)
    assert certificate.merged.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()


@pytest.mark.parametrize("way", ["itself", "symlink", "hardlink"])
def test_the_base_is_never_the_output(run: str, model: str, tmp_path: Path, way: str) -> None:
    base, output = Path(model), tmp_path / "link.gguf"
    before = base.read_bytes()
    if way == "itself":
        output = base
    elif way == "symlink":
        output.symlink_to(base)
    else:
        output.hardlink_to(base)
    with pytest.raises(MergeError, match="is the base of the run"):
        merge(run, str(output), overwrite=True)
    assert base.read_bytes() == output.read_bytes() == before


def test_outputs_that_are_no_files(run: str, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other.gguf.certificate.json").mkdir()
    for name, complaint in (
        ("folder.gguf", "is a directory"),
        ("other.gguf", "is a directory"),
        ("tuned.safetensors", r"writes a \.gguf file or a directory"),
        ("tuned.bin", r"writes a \.gguf file or a directory"),
    ):
        with pytest.raises(MergeError, match=complaint):
            merge(run, str(tmp_path / name), overwrite=True)
    assert names(tmp_path) == {"folder.gguf", "other.gguf.certificate.json"}


def test_refusals_are_one_line(model: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = write_run(tmp_path / "lora", Path(model), LoRA(rank=2))
    for source in (str(lora), str(tmp_path / "nothing"), model):
        assert main(["merge", source, str(tmp_path / "tuned.gguf")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert names(tmp_path) == {"lora"}


def test_a_merge_that_llamacpp_does_not_run_leaves_the_older_files(tmp_path: Path) -> None:
    base, output = write_tiny_llama(tmp_path / "base.gguf").path, tmp_path / "out" / "tuned.gguf"
    claim_to_be_a_part(base)
    output.parent.mkdir()
    output.write_text("older")
    source = write_run(tmp_path / "run", base, held_out=False)
    with pytest.raises(MergeError, match=r"tuned\.gguf is not kept: .* llama\.cpp cannot load it"):
        merge(str(source), str(output), overwrite=True)
    assert names(output.parent) == {"tuned.gguf"}
    assert output.read_text() == "older"


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    run: str, model: str, tmp_path: Path, older: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="no limit on the size of files to stand for a full disk")
    output = tmp_path / "tuned.gguf"
    if older:
        output.write_text("older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    base = Path(model).read_bytes()
    # Python ignores the signal that comes with this limit, so the write fails as it does when the disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(base) // 2, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            merge(run, str(output), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(output)
    assert names(tmp_path) == ({"tuned.gguf"} if older else set())
    assert not older or output.read_text() == "older"
    assert Path(model).read_bytes() == base


@pytest.mark.parametrize("limit", [0.5, 5_000])  # within the weights, and within the tokenizer
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_nothing_of_a_directory(
    lora_run: str, model: str, tmp_path: Path, older: bool, limit: float
) -> None:
    resource = pytest.importorskip("resource", reason="no limit on the size of files to stand for a full disk")
    output = tmp_path / "tuned"
    merge(lora_run, str(output))
    before = content(output) if older else {}
    size = (output / "model.safetensors").stat().st_size
    if not older:
        shutil.rmtree(output)
        Path(f"{output}.certificate.json").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    base = Path(model).read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit * size) if limit < 1 else int(limit), hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            merge(lora_run, str(output), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ({"tuned", "tuned.certificate.json"} if older else set())
    assert not older or content(output) == before
    assert Path(model).read_bytes() == base


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_directories_that_are_not_ours_are_not_replaced(lora_run: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"mine exists; .*--overwrite"):
        merge(lora_run, str(mine))
    with pytest.raises(OutputExistsError, match="mine is not what a merge wrote, so it is not replaced"):
        merge(lora_run, str(mine), overwrite=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputExistsError, match="file is not what a merge wrote"):
        merge(lora_run, str(tmp_path / "file"), overwrite=True)
    (tmp_path / "new.certificate.json").mkdir()
    with pytest.raises(OutputExistsError, match="is in the way"):
        merge(lora_run, str(tmp_path / "new"), overwrite=True)
    assert names(tmp_path) == {"mine", "file", "new.certificate.json"}
    assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    merge(lora_run, str(tmp_path / "empty"))
    with pytest.raises(OutputExistsError, match=r"empty exists; .*--overwrite"):
        merge(lora_run, str(tmp_path / "empty"))
    merge(lora_run, str(tmp_path / "empty"), overwrite=True)


def test_what_is_merged_is_never_the_output(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_directory(base)
    first = write_run(tmp_path / "first", base, LoRA(rank=2), held_out=False)
    merge(str(first), str(tmp_path / "merged"))
    second = write_run(tmp_path / "second", tmp_path / "merged", LoRA(rank=2), held_out=False)
    before = content(tmp_path / "merged")
    with pytest.raises(MergeError, match=r"merged would replace .*merged, which this merge reads"):
        merge(str(second), str(tmp_path / "merged"), overwrite=True)
    assert content(tmp_path / "merged") == before


def test_a_directory_is_what_people_and_programs_are_told(
    lora_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    assert main(["merge", lora_run, str(output), "--dtype", "bf16", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads(Path(f"{output}.certificate.json").read_text())
    assert document["files"] == {
        "model.safetensors": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    }
    for text in (
        f"bfloat16, weights off by {document['rounding']['relative']:.2%}",
        "14 tensors, added in float32 to those of tiny.gguf",
        "the one that was trained on",
        "not measured: the run held no rows out",
    ):
        assert text in captured.err, text


_KILLED = """
import hashlib, json, os, pathlib, random, signal, sys, time
from lorafit import merging  # imported before the fork, which is safe as long as nothing was computed
from lorafit.commands.merge import merge

output, weights, *runs = sys.argv[1:]
random.seed(0)
for _ in range(3):
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        while True:
            for run in runs:
                merge(run, output, overwrite=True)
            os.write(begin, b".")
    os.read(begun, 1)
    time.sleep(random.uniform(0.0, 0.2))  # some merges of a tiny model
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    written, proof = pathlib.Path(weights).read_bytes(), json.load(open(output + ".certificate.json"))
    folder = sorted(os.listdir(output)) if os.path.isdir(output) else []
    proved = list(proof["files"].values())[0] if folder else proof["merged"]["sha256"]
    print(json.dumps([hashlib.sha256(written).hexdigest(), proved, folder]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["tuned.gguf", "tuned"])
def test_a_kill_at_any_moment_harms_nothing(model: str, tmp_path: Path, name: str) -> None:
    base = Path(model).read_bytes()
    config = QALoRA(rank=2) if name.endswith(".gguf") else LoRA(rank=2)
    runs = [
        str(write_run(tmp_path / f"run{seed}", Path(model), config, held_out=False, seed=seed)) for seed in range(2)
    ]
    output = tmp_path / "out" / name
    weights = output if name.endswith(".gguf") else output / "model.safetensors"
    whole = []
    for run in runs:
        merge(run, str(output), overwrite=True)
        whole.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    complete = sorted(os.listdir(output)) if output.is_dir() else []
    assert len(set(whole)) == 2
    command = [sys.executable, "-c", _KILLED, str(output), str(weights), *runs]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    seen = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(seen) == 3
    for written, proved, folder in seen:
        assert {written, proved} <= set(whole), "neither an older one nor a whole new one"
        assert folder == complete
    assert Path(model).read_bytes() == base
    # A killed process cannot tidy up, but what it leaves is hidden, and the next merge removes it.
    assert all(left.startswith(".") for left in names(output.parent) - {name, f"{name}.certificate.json"})
    merge(runs[1], str(output), overwrite=True)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == whole[1]
    assert names(output.parent) == {name, f"{name}.certificate.json"}
