"""A directory of safetensors, read and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> type, shape and place of the
data, and under ``__metadata__`` texts by name), and the data of one tensor after the other. A model that is cut into
several files has an index, JSON too, which says which file holds which tensor.

safetensors' own functions map a file as a whole, and what was read once stays resident until the file is closed; they
write what is in memory as a whole. Here a file is opened for each tensor that is read, and a file is written as its
tensors come, so that a model of any size needs the memory of one tensor. Matrices can also stay where they lie, as the
blocks of a GGUF file do: numbers that nobody quantised are blocks of one.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafit.containers.mapped import map_file
from lorafit.errors import ContainerError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsDirectory:
    """The tensors of a model in a directory.

    Attributes:
        path: The directory.
        shapes: Name -> shape, in the order of the files.
    """

    def __init__(self, path: Path, files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.shapes = dict(shapes)
        self._files = dict(files)
        self._mapped: dict[Path, tuple[mmap.mmap, dict[str, Any]]] = {}

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsDirectory:
        """Read the headers: of ``model.safetensors``, or of the files that the index names.

        Raises:
            ContainerError: There is neither, or one of them is broken.
        """
        path = Path(path)
        places: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in [path / SINGLE_FILE] if (path / SINGLE_FILE).is_file() else _indexed_files(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no dict)
                        if name in places:
                            raise ContainerError(f"{file}: {name} is in {places[name].name} too; fetch the model again")
                        places[name] = file
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise _broken(file, error) from None
        return cls(path, places, shapes)

    def read(self, name: str) -> Tensor:
        """One tensor; its pages are given back when the last reference to it goes.

        Raises:
            ContainerError: The file is broken.
        """
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _broken(file, error) from None

    def blocks(self, name: str) -> tuple[Tensor, str] | None:
        """A matrix as it lies in its file, not copied: uint8 [rows, row_bytes], and the name of its type as a format.

        Returns:
            None for what is no matrix, and for types other than float32, bfloat16 and float16.
        """
        mapped, header = self._map(self._files[name])
        kind, shape = header[name]["dtype"], self.shapes[name]
        if len(shape) != 2 or kind not in _DTYPES.values():
            return None
        start, end = header[name]["data_offsets"]
        at = _header_end(mapped) + start
        return torch.frombuffer(mapped, dtype=torch.uint8, count=end - start, offset=at).view(shape[0], -1), kind

    def _map(self, file: Path) -> tuple[mmap.mmap, dict[str, Any]]:
        """A file and its header, which was found sound when it was opened."""
        if file not in self._mapped:
            with file.open("rb") as opened:
                mapped = map_file(opened)
            self._mapped[file] = mapped, json.loads(mapped[8 : _header_end(mapped)])
        return self._mapped[file]


def _header_end(mapped: mmap.mmap) -> int:
    return 8 + int.from_bytes(mapped[:8], "little")


def write_safetensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str],
    shard_bytes: int,
) -> list[Path]:
    """Write the weights of a model: one file, or several and an index where one would be longer than ``shard_bytes``.

    Args:
        directory: Where to; it exists.
        shapes: Name -> shape of every tensor.
        dtype: Type of all of them: float32, bfloat16 or float16.
        tensor: Gives a tensor of that shape and type when its turn comes.
        metadata: Texts for the header of each file.
        shard_bytes: Longest file, unless a single tensor is longer.

    Returns:
        The files of tensors that were written.
    """
    shards = _cut(shapes, dtype.itemsize, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write_file(directory / file, {name: shapes[name] for name in shard}, dtype, tensor, metadata)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [directory / file for file in names]


def _indexed_files(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        # A name that leads elsewhere is no name of a file that came with the model.
        sound = bool(names) and all(Path(name).name == name for name in names)
    except FileNotFoundError:
        raise ContainerError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ContainerError(f"{index} does not say which file holds which tensor; fetch the model again")
    return [path / name for name in names]


def _broken(file: Path, error: Exception) -> ContainerError:
    return ContainerError(f"{file} is not a usable safetensors file ({error}); fetch it again")


def _cut(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names in groups whose tensors fit into a file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = tensor(name)
            assert values.shape == shape and values.dtype == dtype, name
            file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
