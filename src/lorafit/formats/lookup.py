"""ggml's formats whose four bits are a place in a table of unevenly spaced values.

======  ========  =====  ==================================================  ====================================
format  elements  bytes  layout                                              weight
======  ========  =====  ==================================================  ====================================
IQ4_NL  32        18     d, codes[16]                                        d·I[c]
IQ4_XS  256       136    d, high[2], low[4], codes[128]                      d·(s - 32)·I[c], 8 sub-blocks of 32
MXFP4   32        17     e, codes[16]                                        2^(e - 128)·M[c]
======  ========  =====  ==================================================  ====================================

d is a half, e one byte. As in Q4_0, byte i of the 16 bytes of 32 codes holds c[i] and, in its upper half, c[i + 16].
The scale s of sub-block j of IQ4_XS has six bits: the lower four are the lower or (j odd) upper half of byte j // 2 of
``low``, the upper two are bits 2j and 2j + 1 of ``high``, read as one number of 16 bits.

MXFP4 is the microscaling format of the Open Compute Project: a power of two for 32 numbers of one sign bit, two bits of
exponent and one of mantissa. M holds them doubled, so that they are integers, and the power is one less to make up for
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.formats.block import BlockFormat, FloatType, fields, half, joined, looked_up, nibbles

_IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)

_MAGNITUDES = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.int8)
_MXFP4 = torch.cat((_MAGNITUDES, -_MAGNITUDES))
_HALFWAY = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2  # between neighbouring magnitudes
_POWERS = torch.tensor([2.0 ** (e - 128) for e in range(256)])
# 255 is NaN by the standard; from 253 on, the largest values exceed float32.
_POWER = FloatType("u1", 0xFF, 253)


def _unpack_iq4_nl(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * looked_up(_IQ4, nibbles(blocks[:, 2:]))


def _unpack_iq4_xs(blocks: Tensor) -> Tensor:
    low, high = (fields(blocks[:, at:end], 8 // parts) for at, end, parts in ((4, 8, 2), (2, 4, 4)))
    s = (low.transpose(1, 2).flatten(1) | high.transpose(1, 2).flatten(1) << 4).to(torch.int8) - 32
    codes = nibbles(blocks[:, 8:].unflatten(1, (8, 16)))
    return ((half(blocks, 0) * s).unsqueeze(-1) * looked_up(_IQ4, codes)).flatten(1)


def _unpack_mxfp4(blocks: Tensor) -> Tensor:
    return looked_up(_POWERS, blocks[:, :1]) * looked_up(_MXFP4, nibbles(blocks[:, 1:]))


def _pack_mxfp4(weights: Tensor) -> Tensor:
    """The power that puts the largest weight between 8 and 16, then the nearest value, ties to the smaller magnitude.

    Below 2^-125 there is no such power. gguf-py's exponent wraps around there, to NaN at worst; this one stays at 0.
    """
    largest = weights.abs().amax(1, keepdim=True)
    e = (largest.log2().floor() + 125).clamp(min=0).to(torch.uint8)
    magnitude = torch.bucketize(weights.abs() / looked_up(_POWERS, e), _HALFWAY.to(weights.device), out_int32=True)
    codes = magnitude + 8 * ((weights < 0) & (magnitude > 0))
    return torch.cat((e, joined(codes.to(torch.uint8).unflatten(1, (2, 16)), 4)), dim=1)


FORMATS = (
    BlockFormat("IQ4_NL", 20, 32, 18, _unpack_iq4_nl),
    BlockFormat("IQ4_XS", 23, 256, 136, _unpack_iq4_xs),
    BlockFormat("MXFP4", 39, 32, 17, _unpack_mxfp4, _pack_mxfp4, float_type=_POWER),
)
