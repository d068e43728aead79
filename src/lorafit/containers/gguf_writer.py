"""Writing a GGUF file that is another one with some tensors replaced.

Metadata are copied as bytes, never parsed and written anew, so that nothing in them can change: not a type, not an
order, not a float's last bit. Of the tensor table only block formats and offsets change, which have fixed lengths, so
the data start where they did. A tensor in another format has another length, and all that follow it move.

A row is a whole number of blocks in every format, so a tensor is converted some rows at a time, and the memory needed
depends on neither the size of the file nor that of a tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorafit.containers.gguf import GGUFFile, TensorInfo, padded
from lorafit.errors import ContainerError
from lorafit.formats import block_format

_PIECE_WEIGHTS = 1 << 19


class Replacement(Protocol):
    """What a tensor becomes."""

    @property
    def format(self) -> str:
        """Its new block format."""
        ...

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Rows ``start`` and following of the old tensor, uint8 [n, row_bytes], in the new format."""
        ...


class Reader(Protocol):
    """What is read from beginning to end, such as a file."""

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes, or fewer at the end; all that are left for -1."""
        ...


def rewrite(source: GGUFFile, target: str | Path, replacements: Mapping[str, Replacement]) -> None:
    """Write ``source`` with some tensors replaced; the caller makes the file appear whole.

    Args:
        source: The file to start from.
        target: The file to write.
        replacements: Name of a tensor -> what it becomes.

    Raises:
        ContainerError: The source is no longer as long as it was.
        FormatError: A tensor cannot be converted.
    """
    tensors = new_table(source, replacements)
    # Not shutil.copyfile: when the disk is full, that names the source.
    with source.path.open("rb") as old, Path(target).open("wb") as new:
        new.write(new_head(source, read_head(source, old), tensors))
        for info in source.tensors.values():
            assert new.tell() == tensors[info.name].offset
            replacement = replacements.get(info.name)
            for start, blocks in read_rows(old, info):
                new.write((replacement.convert(start, blocks) if replacement else blocks).contiguous().numpy().data)
            new.write(new_gap(source, read_gap(source, old, info), info, tensors[info.name]))


def new_table(source: GGUFFile, replacements: Mapping[str, Replacement]) -> dict[str, TensorInfo]:
    """The tensor table of ``source`` after its replacements.

    Raises:
        FormatError: A tensor's rows are not a whole number of blocks of its new format.
    """
    tensors: dict[str, TensorInfo] = {}
    place = _data_at(source)
    for name, info in source.tensors.items():
        format_name = replacements[name].format if name in replacements else info.format
        width = info.shape[-1]
        rows = info.nbytes // block_format(info.format).row_bytes(width)
        nbytes = rows * block_format(format_name).row_bytes(width)
        tensors[name] = replace(info, format=format_name, offset=place, nbytes=nbytes)
        place = padded(place + nbytes, source.alignment)
    return tensors


def read_head(source: GGUFFile, file: Reader) -> bytes:
    """Everything before the first tensor's data."""
    return file.read(_data_at(source))


def new_head(source: GGUFFile, head: bytes, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The same with the new tensor table."""
    table = b"".join(_table_entry(info, len(head)) for info in tensors.values())
    return head[: source.table_at] + table + head[source.table_at + len(table) :]


def read_rows(file: Reader, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """The rows of a tensor from where its data start: number of the first, and uint8 [n, row_bytes], some at a time.

    Raises:
        ContainerError: The file ends within the tensor.
    """
    row_bytes = block_format(info.format).row_bytes(info.shape[-1])
    # By the number of weights and not of bytes, so that a tensor and what it becomes are cut at the same rows.
    rows, at_once = info.nbytes // row_bytes, max(_PIECE_WEIGHTS // info.shape[-1], 1)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        data = bytearray(file.read(count * row_bytes))
        if len(data) < count * row_bytes:
            raise ContainerError(f"the file of {info.name} ends within it; did something else write to it meanwhile?")
        yield start, torch.frombuffer(data, dtype=torch.uint8).view(count, row_bytes)


def read_gap(source: GGUFFile, file: Reader, info: TensorInfo) -> bytes:
    """What stands between the end of a tensor's data and the next one's, or the end of the file."""
    end = info.offset + info.nbytes
    is_last = info.name == next(reversed(source.tensors))
    return file.read(-1 if is_last else padded(end, source.alignment) - end)


def new_gap(source: GGUFFile, gap: bytes, info: TensorInfo, moved: TensorInfo) -> bytes:
    """The same after the tensor of ``info`` became that of ``moved``; padding anew, if its length changed."""
    if moved.nbytes == info.nbytes:
        return gap
    before, after = (-(each.offset + each.nbytes) % source.alignment for each in (info, moved))
    return bytes(after) + gap[before:]


def _data_at(source: GGUFFile) -> int:
    return next(iter(source.tensors.values())).offset


def _table_entry(info: TensorInfo, data_at: int) -> bytes:
    name, type_id = info.name.encode(), block_format(info.format).type_id
    assert type_id is not None, f"{info.format} is no format of GGUF files"
    dimensions = info.shape[::-1]
    return (
        struct.pack("<Q", len(name)) + name
        + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        + struct.pack("<IQ", type_id, info.offset - data_at)
    )  # fmt: skip
