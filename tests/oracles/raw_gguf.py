"""GGUF files byte by byte, broken ones too: the layout is written out with ``struct`` and nothing is checked."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Entry = tuple[str | bytes, int, Any]


@dataclass(frozen=True)
class RawTensor:
    """An entry of the tensor table and its data.

    Attributes:
        name: Its name.
        dimensions: The fastest first, as in the file.
        kind: Number of the block format.
        data: Its bytes.
        offset: What the table says of its place; None for where it is.
    """

    name: str | bytes
    dimensions: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A value without its type; an array's content is (type of its elements, elements)."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        inner, elements = content
        return struct.pack("<IQ", inner, len(elements)) + b"".join(value(inner, element) for element in elements)
    return struct.pack("<" + CODES[kind], content)


def gguf_bytes(
    entries: Sequence[Entry] = (),
    tensors: Sequence[RawTensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    entry_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A whole file; the counts are those of what is there unless others are to be claimed."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    for key, kind, content in entries:
        head += string(key) + struct.pack("<I", kind) + value(kind, content)
    data = b""
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        head += string(tensor.name) + struct.pack("<I", len(tensor.dimensions))
        head += struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions)
        head += struct.pack("<IQ", tensor.kind, len(data) if tensor.offset is None else tensor.offset)
        data += tensor.data
    return head + bytes(-len(head) % alignment) + data
