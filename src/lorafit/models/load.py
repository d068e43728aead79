"""From a name, file or directory to a model that is ready to train, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.adapters import load_adapter, read_record
from lorafit.config import Compute
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.stamp import take_stamp
from lorafit.errors import MissingFileError
from lorafit.models import keymap
from lorafit.models.base import Base
from lorafit.models.directory import load_directory
from lorafit.models.gguf import model_from_gguf
from lorafit.models.longrope import settle_rotary
from lorafit.models.pull import EMBEDDED, pull
from lorafit.models.tokenizer import tokenizer_from_gguf


def load(model: str | Path, *, compute: Compute = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, or a run with its adapter.

    Args:
        model: ``smollm2-135m``, a .gguf file, a Hugging Face directory, or the directory of a run.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        MissingFileError: Nothing is there, or the base of the run has gone.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
        AdapterError: The adapter does not fit its base.
    """
    adapter = Path(model) / "adapter"
    if not adapter.is_dir():
        base = load_base(model, compute=compute)
        return base.model, base.tokenizer
    base = load_base(read_record(adapter).base, compute=compute)
    load_adapter(base.model, adapter)
    return base.model, base.tokenizer


def load_base(model: str | Path, *, compute: Compute = "auto") -> Base:
    """Load a base model.

    Args:
        model: ``smollm2-135m``, a .gguf file, or a Hugging Face directory.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.

    Raises:
        MissingFileError: Nothing is there.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
    """
    path = _resolve(model)
    dtype = compute_dtype(compute)
    _settle_sines()
    if path.is_dir():
        base = load_directory(path, dtype)
        settle_rotary(base.model, str(path))
        return base
    stamp = take_stamp(path)
    file = GGUFFile.open(path)
    licence = str(file.metadata.get("general.license", "not stated"))
    keymap.family_of_file(file.metadata, str(path))  # of an unknown one, read nothing else
    tokenizer = tokenizer_from_gguf(file)
    return Base(model_from_gguf(file, tokenizer, dtype), tokenizer, path, dtype, stamp, licence)


def compute_dtype(compute: Compute) -> torch.dtype:
    """The arithmetic type that ``--compute`` names on this machine."""
    if compute == "auto":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]


def _settle_sines() -> None:
    """Use the sine and the cosine once, in one thread.

    MKL chooses how to compute them when they are first used. When several threads are first together, which for the
    rotary embedding they are, one of them may get a coarse version that is off by 1e-4: in about one process of a
    hundred, the first forward pass differs from all later ones.
    """
    torch.ones(1).sin()
    torch.ones(1).cos()


def _multiplies_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _resolve(model: str | Path) -> Path:
    if str(model) in EMBEDDED:
        return pull(str(model))
    path = Path(model)
    if not path.exists():
        names = ", ".join(EMBEDDED)
        raise MissingFileError(
            f"{model}: no such model; give a .gguf file, a directory of safetensors, a run, or one of: {names}"
        )
    return path
