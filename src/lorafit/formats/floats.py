"""Weights that are plain numbers: a block is one weight.

======  =====  =====================================================
format  bytes  weight
======  =====  =====================================================
F32     4      float32
F16     2      half precision: 5 bits of exponent, 10 of mantissa
BF16    2      the upper half of a float32
======  =====  =====================================================

Packing rounds to the nearest number, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.formats.block import BRAIN, FLOAT, HALF, BlockFormat, as_bytes


def _unpack_as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


def _pack_as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda weights: as_bytes(weights.to(dtype))


FORMATS = tuple(
    BlockFormat(name, type_id, 1, dtype.itemsize, _unpack_as(dtype), _pack_as(dtype), float_type=float_type)
    for name, type_id, dtype, float_type in (
        ("F32", 0, torch.float32, FLOAT),
        ("F16", 1, torch.float16, HALF),
        ("BF16", 30, torch.bfloat16, BRAIN),
    )
)
