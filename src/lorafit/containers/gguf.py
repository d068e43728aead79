"""A bounded reader of GGUF files.

A GGUF file is ``GGUF``, a version, the counts of tensors and of metadata entries, the entries (key, type, value), the
tensor table (name, dimensions with the fastest first, block format, offset), and, aligned, the tensor data. All numbers
are little-endian; a string is a 64-bit length and UTF-8 bytes.

The file is mapped, not read: opening a file of any size costs its metadata, and tensor data become pages only where
they are used. Nothing that the file claims is believed before it is checked against the bytes that are there, so that a
truncated or hostile file ends in a ``ContainerError``, not in a crash or an allocation of terabytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.containers.mapped import map_file
from lorafit.errors import ContainerError, FormatError, MissingFileError
from lorafit.formats import block_format, format_by_id

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS: no writer makes more
_MAX_NAME = 63  # bytes, GGML_MAX_NAME without its zero


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
        name: Name in the file.
        format: Block format name.
        shape: Row-major shape: [out, in] for a matrix (the file lists the fastest dimension first).
        offset: Where its data start, in bytes from the start of the file.
        nbytes: Length of its data.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open, memory-mapped GGUF file.

    Attributes:
        path: Where it lies.
        metadata: Key -> int, float, bool, str, list of str, or numpy array for arrays of numbers.
        tensors: Name -> entry of the tensor table, in the file's order.
        table_at: Where the tensor table starts, in bytes from the start of the file; before it lie the metadata.
        alignment: Tensor data start at multiples of this.
    """

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        parser = _Parser(path, mapped)
        self.path = path
        self.metadata, self.tensors = parser.parse()
        self.table_at, self.alignment = parser.table_at, parser.alignment
        self._entries = parser.entries
        self._mapped = mapped

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file and read its metadata and tensor table.

        Raises:
            MissingFileError: No such file.
            ContainerError: Not a GGUF file, truncated or corrupted.
        """
        path = Path(path)
        if path.is_dir():
            raise ContainerError(f"{path} is a directory, not a GGUF file")
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ContainerError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
            mapped = map_file(file)
        return cls(path, mapped)

    def raw_value(self, key: str) -> bytes:
        """Type and value of a metadata entry, as they lie in the file."""
        start, end = self._entries[key]
        return self._mapped[start:end]

    def blocks(self, name: str) -> Tensor:
        """The packed data of a tensor as they lie in the file: uint8 [rows, row_bytes], not copied.

        Writing into the result changes memory only, never the file.
        """
        info = self.tensors[name]
        flat = torch.frombuffer(self._mapped, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        return flat.view(-1, block_format(info.format).row_bytes(info.shape[-1]))


class _Parser:
    """Reads the head of a file, checking every claim against the bytes that are left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 4
        self.table_at = 0
        self.alignment = 32
        self.entries: dict[str, tuple[int, int]] = {}  # where type and value of each key lie

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version = self.number("<I")
        if version not in (2, 3):
            raise self.broken(
                f"its version is {version}, and lorafit reads 2 and 3 (a big-endian file must be converted)"
            )
        tensor_count, entry_count = self.number("<Q"), self.number("<Q")
        # The smallest entry is a key's length, a type and a byte; the smallest tensor a name's length and four numbers.
        self.bounded(entry_count, 13, "metadata entries")
        self.bounded(tensor_count, 32, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string()
            if key in metadata:
                raise self.broken(f"the key {_quoted(key)} stands twice in its metadata")
            start = self.at
            metadata[key] = self.value(self.number("<I"), key)
            self.entries[key] = (start, self.at)
        self.table_at = self.at
        entries = [self.tensor() for _ in range(tensor_count)]
        self.alignment = alignment = metadata.get("general.alignment", self.alignment)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {_quoted(str(alignment))}, not a power of two")
        start = place = padded(self.at, alignment)
        tensors: dict[str, TensorInfo] = {}
        for name, format_name, shape, relative in entries:
            if name in tensors:
                raise self.broken(f"two tensors are called {_quoted(name)}")
            # As llama.cpp does, accept no gaps and no overlaps: a damaged offset would give other weights in silence.
            if start + relative != place:
                raise self.broken(f"tensor {_quoted(name)} is said to start at {start + relative}, not at {place}")
            tensors[name] = self.placed(name, format_name, shape, place)
            place = padded(place + tensors[name].nbytes, alignment)
        return metadata, tensors

    def placed(self, name: str, format_name: str, shape: tuple[int, ...], offset: int) -> TensorInfo:
        try:
            nbytes = math.prod(shape[:-1]) * block_format(format_name).row_bytes(shape[-1])
        except FormatError as error:
            raise self.broken(f"tensor {_quoted(name)}: {error}") from None
        if offset + nbytes > self.size:
            raise self.broken(
                f"tensor {_quoted(name)} needs {nbytes} bytes at {offset}, but the file ends at {self.size}; "
                "it is truncated or corrupted: fetch it again"
            )
        return TensorInfo(name, format_name, shape, offset, nbytes)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self.string()
        if len(name.encode()) > _MAX_NAME:
            raise self.broken(f"the tensor name {_quoted(name)} is longer than {_MAX_NAME} bytes")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.broken(f"tensor {_quoted(name)} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self.broken(f"tensor {_quoted(name)} has the shape {list(shape)}")
        try:
            format_name = format_by_id(self.number("<I")).name
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {_quoted(name)} {error}") from None
        return name, format_name, shape, self.number("<Q")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.broken(f"metadata {_quoted(key)} has the unknown type {kind}")
        return self.numbers(kind, 1)[0].item()

    def array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.bounded(count, 8, f"strings in {_quoted(key)}")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.broken(f"metadata {_quoted(key)} is an array of the unsupported type {kind}")
        self.bounded(count, np.dtype(_SCALARS[kind]).itemsize, f"values in {_quoted(key)}")
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"the text at byte {self.at - len(raw)} is not UTF-8") from None

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self.size:
            raise self.broken(f"it ends at byte {self.size}, inside its own header; fetch it again")
        self.at, start = end, self.at
        return self.data[start:end]

    def bounded(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise self.broken(f"it claims {count} {what}, more than fit into its {self.size} bytes")

    def broken(self, why: str) -> ContainerError:
        return ContainerError(f"{self.path} is not a usable GGUF file: {why}")


def padded(place: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-place // alignment) * alignment


def _quoted(text: str) -> str:
    """Text from a file that may be damaged, fit to stand in one line."""
    return repr(text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}...")
