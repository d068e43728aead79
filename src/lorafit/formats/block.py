"""What a block format is, and the bytes that all of them are made of.

A row of a weight matrix is cut into blocks of ``elements`` consecutive weights, and each block is stored in ``nbytes``
bytes: floating-point scales, perhaps an offset, and small integers. Everything is little-endian.

Unpacking is held to one result, to the last bit. An integer times a half-precision number is exact in float32, so that
most formats round at most once, in an addition or a second product; where they round twice, the order of ggml's
reference code is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lorafit.errors import FormatError

SHARED = 256  # consecutive blocks whose absmax share a scale in double quantisation


class FloatType(NamedTuple):
    """A floating-point type as bits.

    Attributes:
        bits: The numpy type of its bits.
        magnitude: Mask of the bits without the sign.
        limit: The first magnitude that is not a finite number.
    """

    bits: str
    magnitude: int
    limit: int


FLOAT = FloatType("<u4", 0x7FFF_FFFF, 0x7F80_0000)
HALF = FloatType("<u2", 0x7FFF, 0x7C00)
BRAIN = FloatType("<u2", 0x7FFF, 0x7F80)


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Attributes:
        name: Its name; ggml's where ggml has it.
        type_id: Its number in a GGUF file; None for a format that those files do not have.
        elements: Weights in a block.
        nbytes: Bytes of a block.
        unpack: Blocks [n, nbytes] (uint8) -> weights [n, elements] (float32). A double-quantised format takes two more
            arguments, the tensor's constants and the number of each block in the tensor, int64 [n].
        pack: Finite weights [n, elements] (float32) -> blocks [n, nbytes]; None where lorafit only reads the format.
        compress: Double quantisation: what ``pack`` made of a whole tensor -> blocks [n, nbytes] and the constants
            that those share, float32 [``constants(n)``]. None for other formats.
        offset_at: Where in a block its half-precision offset starts; None for a format without one.
        floats: Where in a block its floating-point numbers start.
        float_type: Their type.
    """

    name: str
    type_id: int | None
    elements: int
    nbytes: int
    unpack: Callable[..., Tensor]
    pack: Callable[[Tensor], Tensor] | None = None
    compress: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    offset_at: int | None = None
    floats: tuple[int, ...] = (0,)
    float_type: FloatType = HALF

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

    def constants(self, blocks: int) -> int:
        """How many float32 constants a tensor of ``blocks`` blocks has beside them."""
        return 0 if self.compress is None else 1 + -(-blocks // SHARED)


def half(blocks: Tensor, at: int) -> Tensor:
    """Half-precision number at byte ``at`` of each block: [n, nbytes] -> [n, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def as_bytes(numbers: Tensor) -> Tensor:
    """The bytes of a number for each block: [n, 1] of any type -> [n, bytes of it] uint8."""
    return numbers.contiguous().view(torch.uint8)


def fields(packed: Tensor, width: int) -> Tensor:
    """Fields of ``width`` bits, the lowest first: uint8 [..., k] -> uint8 [..., 8 / width, k]."""
    # By numbers, field by field: torch shifts by a tensor of shifts several times more slowly.
    return torch.stack([packed >> shift & (2**width - 1) for shift in range(0, 8, width)], dim=-2)


def joined(integers: Tensor, width: int) -> Tensor:
    """The inverse of ``fields``: uint8 [..., 8 / width, k] -> uint8 [..., k]."""
    return reduce(torch.bitwise_or, (part << place * width for place, part in enumerate(integers.unbind(-2))))


def nibbles(packed: Tensor) -> Tensor:
    """Integers of 4 bits, all low halves before all high ones: uint8 [..., k] -> uint8 [..., 2 k]."""
    return fields(packed, 4).flatten(-2)


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Entries of a table on any device: [m, ...] and integers [...] -> [..., ...]."""
    return table.to(codes.device).index_select(0, codes.flatten().int()).view(*codes.shape, *table.shape[1:])
