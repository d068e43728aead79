"""ggml's simple formats: 32 weights with a scale d, and perhaps an offset m, in half precision.

======  =====  =======================================  ==========================
format  bytes  layout                                   weight
======  =====  =======================================  ==========================
Q4_0    18     d, low[16]                               d·(q - 8), q in 0..15
Q4_1    20     d, m, low[16]                            d·q + m, q in 0..15
Q5_0    22     d, high[4], low[16]                      d·(q - 16), q in 0..31
Q5_1    24     d, m, high[4], low[16]                   d·q + m, q in 0..31
Q8_0    34     d, 32 signed bytes                       d·q
======  =====  =======================================  ==========================

Byte i of ``low`` holds the lower four bits of q[i] and, in its upper half, those of q[i + 16]. Bit i of ``high``, read
as one number of 32 bits, is the fifth bit of q[i].

A format with an offset is one that QA-LoRA can merge into without loss: adding a constant to all weights of a block
changes m and nothing else.

Packing is ggml's: the symmetric formats put the weight of largest magnitude on the grid's farthest point (q = 0), those
with an offset spread the grid from the smallest weight to the largest. q is computed with the scale before that is
rounded to half precision.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorafit.formats.block import BlockFormat, as_bytes, fields, half, joined, nibbles


def unpack_integers(codes: Tensor, bits: int) -> Tensor:
    """What follows scale and offset in a block, uint8 [n, 16] for 4 bits, [n, 20] for 5 -> integers, uint8 [n, 32]."""
    if bits == 4:
        return nibbles(codes)
    fifth = fields(codes[:, :4], 1).transpose(1, 2).flatten(1)
    return nibbles(codes[:, 4:]) | fifth << 4


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """The inverse of ``unpack_integers``."""
    low = joined((q & 15).unflatten(1, (2, 16)), 4)
    if bits == 4:
        return low
    return torch.cat((joined((q >> 4).unflatten(1, (4, 8)).transpose(1, 2), 1), low), dim=1)


def write_integers(blocks: Tensor, q: Tensor, bits: int, at: int) -> Tensor:
    """The same blocks with other integers, which begin at byte ``at``."""
    return torch.cat((blocks[:, :at], pack_integers(q, bits)), dim=1)


def write_integers_q8_0(blocks: Tensor, q: Tensor) -> Tensor:
    """The same blocks of Q8_0 with other integers, those from -127 counted from 0."""
    return torch.cat((blocks[:, :2], (q.to(torch.int16) - 127).to(torch.int8).view(torch.uint8)), dim=1)


def _rounded(q: Tensor, largest: int) -> Tensor:
    """Cut to whole numbers of 0 to ``largest``.

    Where 1 / d overflowed q is infinite or undefined. There d is zero in half precision, so that every q means the same
    weight; 0 is what gguf-py's conversion to bytes makes of it.
    """
    return q.nan_to_num(0, 0, 0).trunc().clamp(max=largest).to(torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _unpack_symmetric(blocks: Tensor, bits: int) -> Tensor:
    q = unpack_integers(blocks[:, 2:], bits)
    return half(blocks, 0) * (q.to(torch.int8) - 2 ** (bits - 1))


def _pack_symmetric(weights: Tensor, bits: int) -> Tensor:
    centre = 2 ** (bits - 1)
    d = weights.gather(1, weights.abs().argmax(1, keepdim=True)) / -centre
    q = _rounded(weights * _inverse(d) + (centre + 0.5), 2**bits - 1)
    return torch.cat((as_bytes(d.half()), pack_integers(q, bits)), dim=1)


def _unpack_offset(blocks: Tensor, bits: int) -> Tensor:
    return half(blocks, 0) * unpack_integers(blocks[:, 4:], bits) + half(blocks, 2)


def _pack_offset(weights: Tensor, bits: int) -> Tensor:
    m, largest = weights.aminmax(dim=1, keepdim=True)
    d = (largest - m) / (2**bits - 1)
    q = _rounded((weights - m) * _inverse(d) + 0.5, 2**bits - 1)
    return torch.cat((as_bytes(d.half()), as_bytes(m.half()), pack_integers(q, bits)), dim=1)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _pack_q8_0(weights: Tensor) -> Tensor:
    d = weights.abs().amax(1, keepdim=True) / 127
    scaled = (weights * _inverse(d)).nan_to_num(0, 0, 0)
    whole = scaled.trunc()
    q = whole + (2 * (scaled - whole)).trunc()  # halves away from zero
    return torch.cat((as_bytes(d.half()), q.to(torch.int8).view(torch.uint8)), dim=1)


def _symmetric(name: str, type_id: int, nbytes: int, bits: int) -> BlockFormat:
    unpack, pack = partial(_unpack_symmetric, bits=bits), partial(_pack_symmetric, bits=bits)
    return BlockFormat(name, type_id, 32, nbytes, unpack, pack)


def _with_offset(name: str, type_id: int, nbytes: int, bits: int) -> BlockFormat:
    unpack, pack = partial(_unpack_offset, bits=bits), partial(_pack_offset, bits=bits)
    return BlockFormat(name, type_id, 32, nbytes, unpack, pack, offset_at=2, floats=(0, 2))


FORMATS = (
    _symmetric("Q4_0", 2, 18, bits=4),
    _with_offset("Q4_1", 3, 20, bits=4),
    _symmetric("Q5_0", 6, 22, bits=5),
    _with_offset("Q5_1", 7, 24, bits=5),
    BlockFormat("Q8_0", 8, 32, 34, _unpack_q8_0, _pack_q8_0),
)
