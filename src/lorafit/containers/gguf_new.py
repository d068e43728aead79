"""Writing a GGUF file from nothing: metadata, tensor table, data. ``gguf.py`` says what stands where.

Tensors are asked for one at a time, and come in pieces if they like, so that a file costs the memory of the largest
piece. A Python value has its type in the file by its own: str, bool, int (uint32), float (float32), lists of str or
bool, and numpy arrays. What another file says can be passed on as the bytes that it is there (`Raw`).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lorafit.containers.gguf import padded
from lorafit.formats import block_format


@dataclass(frozen=True)
class Raw:
    """A value of another file.

    Attributes:
        content: Its type and itself, as they lie there.
    """

    content: bytes


Value = str | bool | int | float | list[str] | list[bool] | np.ndarray | Raw

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_NUMBERS = {np.dtype(np.int32): 5, np.dtype(np.float32): _FLOAT32, np.dtype(np.bool_): _BOOL}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
        format: Block format.
        shape: Row-major: [out, in] for a matrix.
        pieces: Gives its packed data, uint8, when it is to be written; one piece after the other.
    """

    format: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Length of its data."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * block_format(self.format).row_bytes(self.shape[-1])


def write_gguf(path: str | Path, metadata: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> str:
    """Write a file; the caller makes it appear whole.

    Args:
        path: The file.
        metadata: Key -> value, in this order.
        tensors: Name -> tensor, in this order.

    Returns:
        SHA-256 of what was written.

    Raises:
        FormatError: The rows of a tensor are not a whole number of blocks.
    """
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    place = 0
    for name, tensor in tensors.items():
        type_id = block_format(tensor.format).type_id
        assert type_id is not None, f"{tensor.format} is no format of GGUF files"
        dimensions = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", type_id, place)
        place = padded(place + tensor.nbytes, _ALIGNMENT)
    digest = hashlib.sha256()
    with Path(path).open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        write(head)
        for name, tensor in tensors.items():
            write(bytes(-file.tell() % _ALIGNMENT))
            end = file.tell() + tensor.nbytes
            for piece in tensor.pieces():
                write(piece.contiguous().numpy().data)
            assert file.tell() == end, name
        write(bytes(-file.tell() % _ALIGNMENT))
    return digest.hexdigest()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, Raw):
        return value.content
    if isinstance(value, list) and value and all(isinstance(each, bool) for each in value):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _NUMBERS[value.dtype], len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))  # type: ignore[arg-type]
