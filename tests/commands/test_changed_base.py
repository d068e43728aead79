"""A base that somebody writes to while it is in use: no checkpoint, no adapter and no merged file comes of it.

Nor is an adapter used beside another base than its own."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import lorafit
from lorafit import merging
from lorafit.cli import main
from lorafit.commands.console import Console
from lorafit.commands.train import train
from lorafit.config import TrainConfig
from lorafit.errors import AdapterError, ModelError
from tests.commands.conftest import ROWS
from tests.merging.runs import write_run
from tests.oracles.tiny_gguf import write_tiny_llama


class Touching(Console):
    """Says nothing, and touches a file when a line begins with certain words."""

    def __init__(self, words: str, path: str) -> None:
        super().__init__(quiet=True)
        self.words, self.path = words, Path(path)

    def print(self, text: str = "", *, style: str | None = None) -> None:
        if text.startswith(self.words):
            at = self.path.stat().st_mtime_ns
            os.utime(self.path, ns=(at, at + 1))


@pytest.fixture
def config(data: str, tmp_path: Path) -> TrainConfig:
    write_tiny_llama(tmp_path / "tiny.gguf", layers=1, context=128)
    return TrainConfig(
        str(tmp_path / "tiny.gguf"), data, output=str(tmp_path / "run"), method="qalora", rank=2, steps=4,
        batch_size=len(ROWS), checkpoint_every=1, no_eval=True, samples=3,
    )  # fmt: skip


@pytest.mark.parametrize(("words", "kept"), [("training 2/4", 2), ("training 4/4", 4)])
def test_training_stops_at_the_last_checkpoint_before(config: TrainConfig, words: str, kept: int) -> None:
    model, run = Path(config.model), Path(str(config.output))
    at = model.stat().st_mtime_ns
    with pytest.raises(ModelError, match=r"tiny\.gguf changed after it was loaded .* put the original back"):
        train(config, console=Touching(words, config.model))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{kept}"]
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()
    os.utime(model, ns=(at, at))
    summary = train(config, resume=True)
    whole = train(replace(config, output=f"{run}-whole"))
    files = ("adapter_model.safetensors", "qalora_offsets.safetensors")
    for file in files:
        assert (run / "adapter" / file).read_bytes() == Path(whole.output, "adapter", file).read_bytes()
    assert summary.steps == 4


def test_nothing_is_merged_into_it(config: TrainConfig, tmp_path: Path) -> None:
    path = Path(config.model)
    plan = merging.plan(write_run(tmp_path / "merged", path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="changed after it was loaded"):
        merging.apply(plan, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_base_that_moved_is_merged_from_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, moved = tmp_path / "tiny.gguf", tmp_path / "elsewhere.gguf"
    write_tiny_llama(base, layers=1, context=128)
    run = write_run(tmp_path / "run", base, held_out=False)
    base.replace(moved)
    words = ["merge", str(run), str(tmp_path / "out.gguf")]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"error: {run} was trained on {base}, which is not here; say where it is, as in lorafit merge --base BASE\n"
    )
    write_tiny_llama(base, layers=1, context=128, seed=1)
    assert main([*words, "--base", str(base)]) == 2
    assert "put the original back, or say where it is" in capsys.readouterr().err
    assert main([*words, "--base", str(moved)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", ["merged", "another"])
def test_a_run_is_not_loaded_beside_another_base(tmp_path: Path, other: str) -> None:
    """A merged file in the place of the base is one to which the adapter would be added twice."""
    base = tmp_path / "tiny.gguf"
    write_tiny_llama(base, layers=1, context=128)
    run = write_run(tmp_path / "run", base)
    lorafit.load(run)
    if other == "merged":
        lorafit.merge(str(run), str(tmp_path / "merged.gguf"))
        (tmp_path / "merged.gguf").replace(base)
    else:
        write_tiny_llama(base, layers=1, context=128, seed=1)
    with pytest.raises(AdapterError, match=r"tiny\.gguf is not what .*run was trained on .*put the original back"):
        lorafit.load(run)
