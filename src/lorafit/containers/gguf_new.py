"""Writing a GGUF file from nothing: metadata, tensor table, data. ``gguf.py`` says what stands where.

Tensors are asked for one at a time, so that a file costs the memory of the largest. A Python value has its type in the
file by its own: str, bool, int (uint32), float (float32), and lists of str.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorafit.containers.gguf import padded
from lorafit.formats import block_format

Value = str | bool | int | float | list[str]

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
        format: Block format.
        shape: Row-major: [out, in] for a matrix.
        blocks: Gives its packed data, uint8, when it is to be written.
    """

    format: str
    shape: tuple[int, ...]
    blocks: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Length of its data."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * block_format(self.format).row_bytes(self.shape[-1])


def write_gguf(path: str | Path, metadata: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> None:
    """Write a file; the caller makes it appear whole.

    Args:
        path: The file.
        metadata: Key -> value, in this order.
        tensors: Name -> tensor, in this order.

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
    with Path(path).open("wb") as file:
        file.write(head)
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            blocks = tensor.blocks()
            assert blocks.numel() == tensor.nbytes, name
            file.write(blocks.contiguous().numpy().data)
        file.write(bytes(-file.tell() % _ALIGNMENT))


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
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
