"""A packed model as a directory of safetensors that transformers loads.

Each tensor is unpacked, written and forgotten, so that the memory of one of them is enough. In float32 nothing is lost:
every block format unpacks to float32. In bf16 and fp16 each weight is rounded once, and by how much at most is
measured.

Where the weights came from is written into the directory, in config.json and in the head of each file: the origin's
name and hash, and the block format of each of its tensors. Who quantises such a directory again quantises for the
second time, and is told so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from lorafit import __version__
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.safetensors import SafetensorsDirectory, write_safetensors
from lorafit.errors import MergeError
from lorafit.models.base import Base
from lorafit.models.directory import ORIGIN
from lorafit.models.unpacked import Unpacked, plain_config, unpacked_tensors

SHARD_BYTES = 4_000_000_000  # longest file of weights


@dataclass(frozen=True)
class ExportCertificate:
    """What is known about an exported directory.

    Attributes:
        lorafit: Version that exported.
        source: Name of the file that was unpacked.
        source_sha256: Its hash.
        output: Name of the directory.
        files: Name of each file of weights -> its hash.
        dtype: Type of the weights.
        tensors: How many there are.
        parameters: How many numbers they have.
        bit_identical: Whether every weight is the one that the blocks stand for, to the last bit.
        largest_difference: The largest difference between a weight and what the blocks stand for.
    """

    lorafit: str
    source: str
    source_sha256: str
    output: str
    files: dict[str, str]
    dtype: str
    tensors: int
    parameters: int
    bit_identical: bool
    largest_difference: float

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the directory."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def export_safetensors(
    base: Base,
    directory: Path,
    dtype: torch.dtype,
    *,
    name: str,
    say: Callable[[str], None] = lambda text: None,
) -> ExportCertificate:
    """Write a model, then read what was written and compare it with the model.

    Args:
        base: The model, loaded in float32.
        directory: An empty directory.
        dtype: Type of the weights: float32, bfloat16 or float16.
        name: What the directory will be called.
        say: Is told what is going on.

    Raises:
        MergeError: A weight is too large for the type, or what was written is not what should have been.
        ModelError: The model's file was written to meanwhile.
    """
    assert base.compute == torch.float32, "norms and biases would have been rounded when they were loaded"
    tensors = unpacked_tensors(base.model)
    say(f"hashing {base.path}")
    origin = {"file": base.path.name, "sha256": fingerprint(base.path), "formats": _formats(base, tensors)}
    say(f"writing {len(tensors)} tensors")

    def values(name: str) -> torch.Tensor:
        unpacked = tensors[name].values(dtype)
        if not unpacked.isfinite().all():
            raise MergeError(f"{name} has weights that are too large for {_short(dtype)}; export with --dtype fp32")
        return unpacked

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = {"format": "pt", ORIGIN: json.dumps(origin)}
    files = write_safetensors(directory, shapes, dtype, values, metadata=metadata, shard_bytes=SHARD_BYTES)
    _write_settings(base, directory, dtype, origin)
    say("comparing what was written with the blocks")
    difference = _compare(directory, tensors, dtype, name)
    base.check_unchanged()
    return ExportCertificate(
        lorafit=__version__,
        source=base.path.name,
        source_sha256=str(origin["sha256"]),
        output=name,
        files={file.name: fingerprint(file) for file in files},
        dtype=_short(dtype),
        tensors=len(tensors),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        bit_identical=difference == 0.0,
        largest_difference=difference,
    )


def _formats(base: Base, tensors: dict[str, Unpacked]) -> dict[str, str]:
    """Block format of each tensor of the origin, by the name that it has there."""
    if base.path.is_file():
        return {info.name: info.format for info in GGUFFile.open(base.path).tensors.values()}
    return {name: tensor.format for name, tensor in tensors.items() if tensor.format is not None}


def _write_settings(base: Base, directory: Path, dtype: torch.dtype, origin: dict[str, Any]) -> None:
    """config.json, the tokenizer with its chat template, and what transformers needs to know about generating."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        plain_config(base.model, dtype, {ORIGIN: origin}).save_pretrained(directory)
        base.tokenizer.save_pretrained(directory)
        if base.model.generation_config is not None:
            base.model.generation_config.save_pretrained(directory)
    finally:
        transformers_logging.set_verbosity(level)


def _compare(directory: Path, tensors: dict[str, Unpacked], dtype: torch.dtype, output: str) -> float:
    """The written tensors are the unpacked ones, rounded once; returns the largest difference that this made."""
    written = SafetensorsDirectory.open(directory)
    if written.shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise MergeError(f"{output} is not kept: its tensors are not those of the model; check the disk")
    largest = 0.0
    for name, tensor in tensors.items():
        found, exact = written.read(name), tensor.values(torch.float32)
        if not torch.equal(_bits(found), _bits(exact.to(dtype))):
            raise MergeError(f"{output} is not kept: {name} is not what the blocks stand for; check the disk")
        if dtype != torch.float32:
            largest = max(largest, float((found.float() - exact).abs().max()))
    return largest


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
