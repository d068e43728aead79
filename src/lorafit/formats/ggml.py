"""The block formats of GGUF files.

A row of a weight matrix is cut into blocks of ``elements`` consecutive weights, and each block is stored in ``nbytes``
bytes. With d and m the block's half-precision scale and offset, and q its integers:

======  ========  =====  =============================================================  ==================
format  elements  bytes  layout                                                         weight
======  ========  =====  =============================================================  ==================
F32     1         4      float32                                                        w
F16     1         2      float16                                                        w
Q8_0    32        34     d, 32 signed bytes                                             d·q
Q4_1    32        20     d, m, 16 bytes: byte i holds q[i] (low) and q[i + 16] (high)   d·q + m, q in 0..15
======  ========  =====  =============================================================  ==================

Everything is little-endian. d·q has at most 11 + 8 significant bits, so the product is exact in float32 and only the
addition of m rounds: every correct implementation gives the same float32, fused multiply-add or not.

A scale or weight that is not a finite number comes from a damaged file; ``finite`` finds those, by reading only the
floating-point numbers of each block.

A format with an offset (``offset_at`` is its place in the block) is one that QA-LoRA can merge into without loss:
adding a constant to all weights of a block changes m and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import FormatError


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Attributes:
        name: Its name in ggml.
        type_id: Its number in a GGUF file.
        elements: Weights in a block.
        nbytes: Bytes of a block.
        unpack: Blocks [..., nbytes] (uint8) -> weights [..., elements] (float32).
        offset_at: Where in a block its half-precision offset starts; None for a format without one.
        floats: Where in a block its floating-point numbers start.
        float_type: Their numpy type.
    """

    name: str
    type_id: int
    elements: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor]
    offset_at: int | None = None
    floats: tuple[int, ...] = (0,)
    float_type: str = "<f2"

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights.

        Raises:
            FormatError: The row is not a whole number of blocks.
        """
        if width % self.elements:
            raise FormatError(
                f"a row of {width} weights is not a whole number of {self.name} blocks of {self.elements}"
            )
        return width // self.elements * self.nbytes


def _half(blocks: Tensor, at: int) -> Tensor:
    """Half-precision number at byte ``at`` of each block: [..., nbytes] -> [..., 1] float32."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _unpack_f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _unpack_f16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16).float()


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[..., 2:].view(torch.int8)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    nibbles = torch.cat((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), dim=-1)
    return _half(blocks, 0) * nibbles + _half(blocks, 2)


FORMATS = {
    block.name: block
    for block in (
        BlockFormat("F32", 0, 1, 4, _unpack_f32, float_type="<f4"),
        BlockFormat("F16", 1, 1, 2, _unpack_f16),
        BlockFormat("Q4_1", 3, 32, 20, _unpack_q4_1, offset_at=2, floats=(0, 2)),
        BlockFormat("Q8_0", 8, 32, 34, _unpack_q8_0),
    )
}

# Formats that files carry and lorafit does not read: named so that an error can name them.
_UNREAD = {
    2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def format_by_id(type_id: int) -> BlockFormat:
    """The format with a number in a GGUF file.

    Raises:
        FormatError: lorafit does not read that format.
    """
    for block in FORMATS.values():
        if block.type_id == type_id:
            return block
    name = _UNREAD.get(type_id)
    known = f"{name} (type {type_id})" if name else f"type {type_id}, which is not a known format"
    raise FormatError(f"has {known}; lorafit reads {', '.join(FORMATS)}")


def block_format(name: str) -> BlockFormat:
    """The format called ``name``.

    Raises:
        FormatError: There is no such format.
    """
    if name not in FORMATS:
        raise FormatError(f"{name} is not a format that lorafit reads ({', '.join(FORMATS)})")
    return FORMATS[name]


def dequantize(blocks: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """The weights that ``blocks`` hold.

    Args:
        blocks: uint8, any shape; its bytes are whole blocks in row-major order.
        name: Format name, a key of ``FORMATS``.
        shape: Shape of the result; its last dimension must be a whole number of blocks.

    Returns:
        float32 tensor of ``shape`` that shares no memory with ``blocks``.

    Raises:
        FormatError: Unknown format, or a byte count that does not fit the shape.
    """
    block = block_format(name)
    *outer, width = shape or (1,)
    expected = math.prod(outer) * block.row_bytes(width)
    if blocks.dtype != torch.uint8 or blocks.numel() != expected:
        raise FormatError(
            f"{list(shape)} in {name} takes {expected} bytes (uint8), but {blocks.numel()} of {blocks.dtype} were given"
        )
    # The copy begins at an even address, which torch's views need and a slice of a byte buffer need not.
    return block.unpack(blocks.reshape(-1, block.nbytes).clone()).reshape(tuple(shape))


def finite(blocks: Tensor, name: str) -> bool:
    """Whether all scales and offsets, or the weights themselves where they are floats, are finite numbers.

    Args:
        blocks: uint8, whole blocks.
        name: Format name, a key of ``FORMATS``.
    """
    block = block_format(name)
    numbers = blocks.numpy().reshape(-1).view(block.float_type)
    step = block.nbytes // numbers.itemsize
    return all(bool(np.isfinite(numbers[at // numbers.itemsize :: step]).all()) for at in block.floats)


def read_offsets(blocks: Tensor, name: str) -> Tensor:
    """The offset m of every block.

    Args:
        blocks: uint8 [rows, row_bytes].
        name: A format that has offsets.

    Returns:
        float16 [rows, blocks in a row], a copy.

    Raises:
        FormatError: The format has no offsets.
    """
    block = _with_offsets(name)
    per_block = blocks.unflatten(1, (-1, block.nbytes))
    at = block.offset_at
    return per_block[..., at : at + 2].clone().view(torch.float16).squeeze(-1)  # type: ignore[operator]


def write_offsets(blocks: Tensor, name: str, offsets: Tensor) -> Tensor:
    """A copy of ``blocks`` with other offsets; every other byte is the same.

    Args:
        blocks: uint8 [rows, row_bytes].
        name: A format that has offsets.
        offsets: float16 [rows, blocks in a row].

    Raises:
        FormatError: The format has no offsets, or there is not one for each block.
    """
    block = _with_offsets(name)
    result = blocks.clone()
    at = block.offset_at
    per_block = result.unflatten(1, (-1, block.nbytes))
    if offsets.shape != per_block.shape[:2]:
        raise FormatError(f"{list(per_block.shape[:2])} {name} blocks cannot take {list(offsets.shape)} offsets")
    per_block[..., at : at + 2] = offsets.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)  # type: ignore[operator]
    return result


def _with_offsets(name: str) -> BlockFormat:
    block = block_format(name)
    if block.offset_at is None:
        raise FormatError(f"{name} blocks have no offset")
    return block
