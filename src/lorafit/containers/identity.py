"""The hash of a model's tensors: two models with the same one are the same base, whatever else is written in them.

A chat template that was mended, another name or another cut into files leave it as it is. A tensor of which one bit
changed does not, and so a model that an adapter was merged into is another model. Hashed are, in the order of their
names, the name, type and shape of each tensor and its bytes as they are stored.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lorafit.containers.gguf import GGUFFile
from lorafit.containers.safetensors import SafetensorsDirectory

_AT_ONCE = 1 << 20  # bytes


def hash_tensors(path: str | Path) -> str:
    """SHA-256 of the tensors of a GGUF file or of a directory of safetensors.

    Raises:
        MissingFileError: No such file.
        ContainerError: It is broken.
    """
    path = Path(path)
    return _hash_directory(path) if path.is_dir() else _hash_file(path)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    # Read and not mapped, so that the process does not grow by the file.
    with path.open("rb") as file:
        for info in sorted(GGUFFile.open(path).tensors.values(), key=lambda info: info.name):
            digest.update(_head(info.name, info.format, info.shape))
            file.seek(info.offset)
            for start in range(0, info.nbytes, _AT_ONCE):
                digest.update(file.read(min(_AT_ONCE, info.nbytes - start)))
    return digest.hexdigest()


def _hash_directory(path: Path) -> str:
    digest = hashlib.sha256()
    files = SafetensorsDirectory.open(path)
    for name, shape in sorted(files.shapes.items()):
        tensor = files.read(name)
        digest.update(_head(name, str(tensor.dtype), shape))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _head(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    return f"{name}\n{kind}\n{list(shape)}\n".encode()
