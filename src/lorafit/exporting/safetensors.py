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
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.models.base import Base
from lorafit.models.directory import ORIGIN, said_of_itself
from lorafit.models.saving import compare_directory, save_directory, short
from lorafit.models.unpacked import Unpacked, unpacked_tensors


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
    origin["general"] = said_of_itself(base.path)
    say(f"writing {len(tensors)} tensors")
    files = save_directory(base, directory, tensors, dtype, {ORIGIN: origin})
    say("comparing what was written with the blocks")
    difference = compare_directory(directory, tensors, dtype, name).largest
    base.check_unchanged()
    return ExportCertificate(
        lorafit=__version__,
        source=base.path.name,
        source_sha256=str(origin["sha256"]),
        output=name,
        files={file.name: fingerprint(file) for file in files},
        dtype=short(dtype),
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        bit_identical=difference == 0.0,
        largest_difference=difference,
    )


def _formats(base: Base, tensors: dict[str, Unpacked]) -> dict[str, str]:
    """Block format of each tensor of the origin, by the name that it has there."""
    if base.path.is_file():
        return {info.name: info.format for info in GGUFFile.open(base.path).tensors.values()}
    return {name: tensor.format for name, tensor in tensors.items() if tensor.format is not None}
