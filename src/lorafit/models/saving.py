"""Writing a model as a directory that transformers loads, and reading what was written beside what should have been.

Each tensor is computed, written and forgotten, and computed once more to be compared, some rows at a time, so that the
memory of a few of them is enough, however large the model is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lorafit.containers.safetensors import SafetensorsDirectory, write_safetensors
from lorafit.errors import MergeError
from lorafit.models.base import Base
from lorafit.models.unpacked import Unpacked, plain_config

SHARD_BYTES = 4_000_000_000  # longest file of weights

_AT_ONCE = 1 << 17  # weights that are compared at once


@dataclass(frozen=True)
class Rounding:
    """How far written weights are from what they were rounded from.

    Attributes:
        largest: Largest difference.
        relative: Root mean square of the differences, relative to that of the weights.
    """

    largest: float
    relative: float


def save_directory(
    base: Base, directory: Path, tensors: Mapping[str, Unpacked], dtype: torch.dtype, notes: Mapping[str, Any]
) -> list[Path]:
    """Write weights, config.json, the tokenizer with its chat template, and what transformers needs to generate.

    Args:
        base: The model that all but the weights are taken from.
        directory: An empty directory.
        tensors: Name in transformers' checkpoints -> tensor.
        dtype: Type of the weights: float32, bfloat16 or float16.
        notes: More entries of config.json; what is no single value is in the head of each file of weights too.

    Returns:
        The files of weights.

    Raises:
        MergeError: A weight is not finite in this type.
    """

    def values(name: str) -> Tensor:
        rounded = tensors[name].values(dtype)
        # The extremes need no memory, and one that is not a number is an extreme.
        if not all(extreme.isfinite() for extreme in rounded.aminmax()):
            raise MergeError(f"{name} has weights that are too large for {short(dtype)}; choose --dtype fp32")
        return rounded

    _save_settings(base, directory, dtype, notes)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    texts = {key: json.dumps(note) for key, note in notes.items() if isinstance(note, dict | list)}
    metadata = {"format": "pt", **texts}
    return write_safetensors(directory, shapes, dtype, values, metadata=metadata, shard_bytes=SHARD_BYTES)


def _save_settings(base: Base, directory: Path, dtype: torch.dtype, notes: Mapping[str, Any]) -> None:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        plain_config(base.model, dtype, notes).save_pretrained(directory)
        base.tokenizer.save_pretrained(directory)
        if base.model.generation_config is not None:
            base.model.generation_config.save_pretrained(directory)
    except Exception as error:
        # Of a full disk the tokenizer's own code says what the system said, but not in Python's way.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    finally:
        transformers_logging.set_verbosity(level)


def compare_directory(directory: Path, tensors: Mapping[str, Unpacked], dtype: torch.dtype, output: str) -> Rounding:
    """The written tensors are those that should have been written, each rounded once; returns how far.

    Args:
        directory: What was written.
        tensors: What should have been.
        dtype: The type that it was rounded to.
        output: What the directory will be called.

    Raises:
        MergeError: They are not.
    """
    written = SafetensorsDirectory.open(directory)
    if written.shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise MergeError(f"{output} is not kept: its tensors are not those of the model; check the disk")
    largest = error = size = 0.0
    for name, tensor in tensors.items():
        found, exact = written.read(name).reshape(-1), tensor.values(torch.float32).reshape(-1)
        for mine, wanted in zip(found.split(_AT_ONCE), exact.split(_AT_ONCE), strict=True):
            if not torch.equal(_bits(mine), _bits(wanted.to(dtype))):
                raise MergeError(f"{output} is not kept: {name} is not what should have been written; check the disk")
            largest = max(largest, float((mine.float() - wanted).abs().max()))
            moved, whole = squared_error(mine.float(), wanted)
            error, size = error + moved, size + whole
    return Rounding(largest, math.sqrt(error / size) if size else 0.0)


def squared_error(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Sums of the squares of the differences and of what is wanted, both of float32 tensors, some weights at a time."""
    error = size = 0.0
    for mine, exact in zip(found.reshape(-1).split(_AT_ONCE), wanted.reshape(-1).split(_AT_ONCE), strict=True):
        error += float((mine - exact).double().square().sum())
        size += float(exact.double().square().sum())
    return error, size


def short(dtype: torch.dtype) -> str:
    """The name of a type without where it comes from."""
    return str(dtype).removeprefix("torch.")


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
