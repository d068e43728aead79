"""Checkpoints: everything that a step depends on, so that a resumed run continues bit for bit.

The rows and the dropout of a step follow from seed and step number, so trained parameters, the optimiser's moments and
the number of steps are all there is. A checkpoint is one file, ``step-N/state.pt``, that appears whole.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorafit.containers.atomic import replacing
from lorafit.errors import MissingFileError, TrainingError
from lorafit.modules import adapter_modules
from lorafit.training.loop import Trainer

_STATE = "state.pt"


def save_checkpoint(trainer: Trainer, run: str | Path) -> Path:
    """Write ``checkpoints/step-N`` of a run and drop older ones; returns the new directory."""
    directory = Path(run) / "checkpoints" / f"step-{trainer.done}"
    adapter = {
        name: {part: parameter.detach() for part, parameter in module.adapter_parameters().items()}
        for name, module in adapter_modules(trainer.model).items()
    }
    state = {
        "step": trainer.done,
        "adapter": adapter,
        "optimizer": trainer.optimizer.state_dict(),
    }
    with replacing(directory / _STATE) as temporary:
        # Through a buffer, because torch does not say that a disk is full.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        temporary.write_bytes(buffer.getbuffer())
        reopened = torch.load(temporary, weights_only=True)
        if reopened["step"] != trainer.done or not _same(reopened["adapter"], adapter):
            raise TrainingError(f"{directory}: what was written is not what was trained; check the disk")
    for other in directory.parent.glob("step-*"):
        if other != directory:
            shutil.rmtree(other)
    return directory


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        MissingFileError: It has none.
    """
    found = [
        (int(match[1]), state.parent)
        for state in Path(run).glob(f"checkpoints/step-*/{_STATE}")
        if (match := re.fullmatch(r"step-(\d+)", state.parent.name))
    ]
    if not found:
        raise MissingFileError(f"{run} has no checkpoint to go on from; train it anew with --overwrite")
    return max(found)[1]


def restore_checkpoint(trainer: Trainer, directory: str | Path) -> None:
    """Bring a trainer to the state in a checkpoint.

    Raises:
        TrainingError: The checkpoint is broken, or belongs to another model or configuration.
    """
    path = Path(directory) / _STATE
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        raise TrainingError(f"{path} is broken, so the run cannot go on from there; train it anew") from None
    adapter = {name: module.adapter_parameters() for name, module in adapter_modules(trainer.model).items()}
    if _shapes(adapter) != _shapes(state["adapter"]):
        raise TrainingError(
            f"{path} is of another model, other targets or another rank; the run cannot go on from there"
        )
    with torch.no_grad():
        for name, parameters in adapter.items():
            for part, parameter in parameters.items():
                parameter.copy_(state["adapter"][name][part])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.done = state["step"]


def _shapes(adapter: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], torch.Size]:
    return {(name, part): tensor.shape for name, parts in adapter.items() for part, tensor in parts.items()}


def _same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name][part], other[name][part]) for name in one for part in one[name]
    )
