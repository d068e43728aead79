"""QLoRA's formats: four bits that are a place in a table, times the largest magnitude of 64 weights (arXiv 2305.14314).

======  =====  ===============================================
format  bytes  layout of 64 weights
======  =====  ===============================================
NF4     36     absmax (float32), codes[32]
FP4     36     absmax (float32), codes[32]
NF4_DQ  33     code of the absmax, codes[32]
FP4_DQ  33     code of the absmax, codes[32]
======  =====  ===============================================

Byte i of ``codes`` holds the code of weight 2i in its upper and of weight 2i + 1 in its lower half. A weight is
table[code] times absmax, one float32 product. NF4's table has the quantiles of the normal distribution; FP4's numbers
have a sign, two bits of exponent and one of mantissa.

Double quantisation stores the absmax in 8 bits too. The mean of all of a tensor's absmax is subtracted; 256 consecutive
blocks (``SHARED``, row-major over the whole tensor) share a scale, their largest magnitude then; and a code is a place
in a table of 256 values in -1..1 that lie closer together near zero (arXiv 1511.04561, signed). Mean and scales are the
tensor's *constants*, float32: the mean, then the scales.

    absmax = dynamic[code] · scale + mean

The bits are those of bitsandbytes, which rounds in its own way: it multiplies by 1 / absmax (at most 1e38) rather than
dividing, a tie goes to the lower value, and a negative weight and a positive one that round to FP4's zero get different
codes. For the 8-bit codes its CPU version first rounds to a grid of 65,535 steps from -1 to 1. Blocks of bitsandbytes
run over the whole tensor and may end within a row; where rows are multiples of 64, and others are refused, the blocks
are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorafit.formats.block import FLOAT, SHARED, BlockFormat, as_bytes, looked_up

_NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
_FP4 = torch.cat((_MAGNITUDES, 0 - _MAGNITUDES))  # both zeros are positive

_STEPS = 65535  # of the grid to which a scaled absmax is rounded first


def _dynamic_table() -> Tensor:
    """The 256 values of an 8-bit code, ascending: seven decades, each with twice the values of the one below."""
    decades = []
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        decades.append(10.0 ** (power - 6) * ((edges[1:] + edges[:-1]) / 2))
    positive = torch.cat(decades)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


DYNAMIC = _dynamic_table()


def _nearest(table: Tensor, values: Tensor) -> Tensor:
    """Place of the nearest of ascending values, the lower one of two as near: float32 -> int32."""
    return torch.bucketize(values, ((table[1:] + table[:-1]) / 2).to(values.device), out_int32=True)


def _unpack_codes(codes: Tensor, table: Tensor) -> Tensor:
    """uint8 [n, 32] -> float32 [n, 64]; a byte looks up its two weights at once."""
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
    return looked_up(pairs, codes).flatten(1)


def _unpack(blocks: Tensor, table: Tensor) -> Tensor:
    return blocks[:, :4].contiguous().view(torch.float32) * _unpack_codes(blocks[:, 4:], table)


def _unpack_double(blocks: Tensor, constants: Tensor, index: Tensor, table: Tensor) -> Tensor:
    absmax = looked_up(DYNAMIC, blocks[:, 0]) * constants[1 + index // SHARED] + constants[0]
    return absmax.unsqueeze(1) * _unpack_codes(blocks[:, 1:], table)


def _pack(weights: Tensor, table: Tensor) -> Tensor:
    absmax = weights.abs().amax(1, keepdim=True)
    scaled = (weights * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1)
    ascending, order = table.sort(stable=True)
    codes = looked_up(order.to(torch.uint8), _nearest(ascending, scaled))
    return torch.cat((as_bytes(absmax), codes[:, 0::2] << 4 | codes[:, 1::2]), dim=1)


def _mean(values: Tensor) -> Tensor:
    """The mean in one thread: with another number of them torch adds up in another order and rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def _compress(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [n, 36] with a float32 absmax -> blocks [n, 33] and constants."""
    absmax = blocks[:, :4].contiguous().view(torch.float32).flatten()
    mean = _mean(absmax)
    centred = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % SHARED)).view(-1, SHARED)
    scales = centred.abs().amax(1, keepdim=True)
    # Not a number where a scale is 0, or so small that its inverse overflows: that gets code 0.
    scaled = (centred * (1 / scales)).clamp(-1, 1).nan_to_num(-1)
    steps = ((scaled + 1) / 2 * _STEPS + 0.5).trunc()
    codes = _nearest(DYNAMIC, 2 * steps / _STEPS - 1)
    codes = codes.flatten()[: len(absmax), None].to(torch.uint8)
    return torch.cat((codes, blocks[:, 4:]), dim=1), torch.cat((mean.view(1), scales.flatten()))


def _formats(name: str, table: Tensor) -> tuple[BlockFormat, BlockFormat]:
    pack = partial(_pack, table=table)
    plain: Callable[..., Tensor] = partial(_unpack, table=table)
    double: Callable[..., Tensor] = partial(_unpack_double, table=table)
    return (
        BlockFormat(name, None, 64, 36, plain, pack, float_type=FLOAT),
        BlockFormat(f"{name}_DQ", None, 64, 33, double, pack, compress=_compress, floats=()),
    )


FORMATS = (*_formats("NF4", _NF4), *_formats("FP4", _FP4))
