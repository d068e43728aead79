"""What is kept for the backward pass changes memory, never a bit of the gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafit.config import AdapterConfig, LoRA, Memory, QALoRA, TrainConfig
from lorafit.data.packing import split_passes
from lorafit.models.load import load_base
from lorafit.modules import attach
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Trainer
from tests.oracles.adapted import documents, fill
from tests.oracles.tiny_gguf import write_tiny_llama

LAYERS = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, intermediate=384, layers=LAYERS
    ).path


def step(path: Path, adapter: AdapterConfig, memory: Memory) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that were kept for the backward pass."""
    model = load_base(path, compute="fp32").model
    torch.manual_seed(0)
    attach(model, adapter)
    fill(model)
    trainer = Trainer(model, sft_loss, TrainConfig("tiny", "rows", learning_rate=0.01, steps=1, memory=memory))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        done = trainer.step(split_passes(documents([30, 12, 25]), 1000))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return done.loss, gradients, sum(kept.values())


@pytest.mark.parametrize("adapter", [LoRA(rank=4, dropout=0.2), QALoRA(rank=4)])
def test_less_memory_gives_the_same_bits_and_keeps_less(path: Path, adapter: AdapterConfig) -> None:
    loss, gradients, kept = step(path, adapter, "high")
    # What stays is each layer's input and the loss's own, and with low every second layer as a whole (dropout keeps
    # layers in pieces), or all but gate and up.
    for memory, share in (("low", 0.6), ("lowest", 0.25)):
        same_loss, same_gradients, kept_less = step(path, adapter, memory)
        assert same_loss == loss
        assert same_gradients.keys() == gradients.keys()
        assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items())
        assert kept_less < share * kept
    # Left open, a trainer alone keeps everything.
    assert step(path, adapter, "auto")[2] == kept


_CHILD = "from lorafit.training.memory import peak_rss_bytes; print(peak_rss_bytes())"
_PARENT = f"""
import subprocess, sys
held = b"x" * 2_000_000_000
subprocess.run([sys.executable, "-c", {_CHILD!r}], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's figure is the process's own")
def test_the_peak_is_that_of_the_process_itself() -> None:
    """A process that another one with much memory starts has none of it."""
    told = subprocess.run([sys.executable, "-c", _PARENT], capture_output=True, text=True, check=True).stdout
    # Python with torch and transformers, between what it cannot do without and half of what its parent holds.
    assert 100e6 < int(told) < 1000e6
