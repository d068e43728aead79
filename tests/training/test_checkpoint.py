"""A resumed run is the run that was not interrupted, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.config import AdapterConfig, LoRA, QALoRA, TrainConfig
from lorafit.errors import MissingFileError, TrainingError
from lorafit.models.load import load_base
from lorafit.modules import attach
from lorafit.objectives.sft import sft_loss
from lorafit.training.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint
from lorafit.training.loop import Trainer
from tests.oracles.adapted import documents
from tests.oracles.tiny_gguf import write_tiny_llama

DOCUMENTS = documents([30, 12, 25, 40, 9, 33, 18])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, layers=1).path


def trainer(path: Path, adapter: AdapterConfig, **settings: Any) -> Trainer:
    model = load_base(path, compute="fp32").model
    config = TrainConfig("tiny", "rows.jsonl", learning_rate=0.01, steps=7, batch_size=3, weight_decay=0.01, **settings)
    attach(model, adapter)
    return Trainer(model, sft_loss, config)


def trained(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", [LoRA(rank=4, dropout=0.3), QALoRA(rank=4)])
def test_a_resumed_run_is_the_uninterrupted_one(path: Path, tmp_path: Path, adapter: AdapterConfig) -> None:
    torch.manual_seed(0)
    whole = trainer(path, adapter)
    losses = []
    for step in whole.steps(DOCUMENTS):
        losses.append(step.loss)
        if step.step == 3:
            assert save_checkpoint(whole, tmp_path) == tmp_path / "checkpoints" / "step-3"

    torch.manual_seed(99)  # another initialisation and another random state
    resumed = trainer(path, adapter)
    restore_checkpoint(resumed, last_checkpoint(tmp_path))
    assert resumed.done == 3
    rest = list(resumed.steps(DOCUMENTS))
    assert [step.step for step in rest] == [4, 5, 6, 7]
    assert [step.loss for step in rest] == losses[3:]
    expected = trained(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained(resumed).items())


def test_only_the_newest_is_kept_and_found(path: Path, tmp_path: Path) -> None:
    run = trainer(path, LoRA(rank=2))
    for run.done in (2, 9, 10):
        save_checkpoint(run, tmp_path)
        assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == [f"step-{run.done}"]
    assert [file.name for file in (tmp_path / "checkpoints" / "step-10").iterdir()] == ["state.pt"]
    # 10 is more than 9, and a directory in which nothing was finished is no checkpoint.
    (tmp_path / "checkpoints" / "step-9").mkdir()
    (tmp_path / "checkpoints" / "step-9" / "state.pt").write_bytes(b"")
    (tmp_path / "checkpoints" / "step-11").mkdir()
    (tmp_path / "checkpoints" / "step-11" / ".state.pt.1.tmp").write_bytes(b"")
    assert last_checkpoint(tmp_path).name == "step-10"


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="has no checkpoint to go on from; train it anew"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        LoRA(rank=4, targets="q_proj"),
        LoRA(rank=2),
        LoRA(rank=4, targets="lm_head"),
        QALoRA(rank=4),
    ],
)
def test_another_adapter_cannot_go_on(path: Path, tmp_path: Path, other: AdapterConfig) -> None:
    # A factor of one row would broadcast into any rank if nobody looked.
    for rank in (4, 1):
        save_checkpoint(trainer(path, LoRA(rank=rank)), tmp_path / str(rank))
        run = trainer(path, other)
        before = trained(run)
        with pytest.raises(TrainingError, match="other targets or another rank"):
            restore_checkpoint(run, last_checkpoint(tmp_path / str(rank)))
        assert run.done == 0
        assert all(torch.equal(value, before[name]) for name, value in trained(run).items())


def test_a_broken_file_is_named(path: Path, tmp_path: Path) -> None:
    run = trainer(path, LoRA(rank=2))
    state = save_checkpoint(run, tmp_path) / "state.pt"
    whole = state.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"not a checkpoint at all", whole[:200] + bytes(200) + whole[400:]):
        state.write_bytes(broken)
        with pytest.raises(TrainingError, match=r"state\.pt is broken"):
            restore_checkpoint(run, state.parent)
