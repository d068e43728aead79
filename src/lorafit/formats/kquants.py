"""ggml's K-quants: 256 weights in sub-blocks whose scales are integers times one half-precision number of the block.

======  =====  ======================================================  ==========================================
format  bytes  layout                                                  weight
======  =====  ======================================================  ==========================================
Q2_K    84     scales[16], low[64], d, e                               d·s·q - e·t, 16 sub-blocks, q in 0..3
Q3_K    110    high[32], low[64], scales[12], d                        d·(s - 32)·(q - 4), 16 sub-blocks, q in 0..7
Q4_K    144    d, e, scales[12], low[128]                              d·s·q - e·t, 8 sub-blocks, q in 0..15
Q5_K    176    d, e, scales[12], high[32], low[128]                    d·s·q - e·t, 8 sub-blocks, q in 0..31
Q6_K    210    low[128], high[64], scales[16], d                       d·s·(q - 32), 16 sub-blocks, q in 0..63
======  =====  ======================================================  ==========================================

d and e are halves, s and t the integer scales and offsets of a sub-block. ``low`` and ``high`` hold the lower and the
upper bits of q in runs: the lowest field of each byte of a run (of 32 bytes; of 64 for the low bits of Q6_K) belongs to
the first weights, the next field to those that follow, so that reading a run field by field gives the weights in order.

Scales: in Q2_K a byte is s and, in its upper half, t. In Q6_K it is s, signed. Q4_K and Q5_K put eight of 6 bits each
for s and t into 12 bytes, Q3_K sixteen for s; see ``scales_q4_k`` and ``_scales_q3_k``.

Packing is not ggml's, whose error it betters: see ``ksearch`` and ``koffset``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorafit.formats.block import BlockFormat, as_bytes, fields, half, joined, nibbles
from lorafit.formats.koffset import shifted
from lorafit.formats.ksearch import scaled


def _in_runs(packed: Tensor, width: int, run: int, sub_blocks: int) -> Tensor:
    """Fields of ``width`` bits, run by run: uint8 [n, k] -> uint8 [n, sub_blocks, 256 / sub_blocks]."""
    return fields(packed.unflatten(1, (-1, run)), width).reshape(len(packed), sub_blocks, -1)


def _into_runs(integers: Tensor, width: int, run: int) -> Tensor:
    """The inverse of ``_in_runs``: uint8 [n, sub-blocks, weights] -> uint8 [n, k]."""
    return joined(integers.reshape(len(integers), -1, 8 // width, run), width).flatten(1)


def scales_q4_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales s and offsets t of the eight sub-blocks of Q4_K and Q5_K: uint8 [n, 12] -> two uint8 [n, 8].

    Bytes 0 to 3 hold s[0..3] and bytes 4 to 7 t[0..3] in their lower six bits. Bytes 8 to 11 hold the lower four bits
    of s[4..7] and, in their upper half, of t[4..7], whose upper two bits are the upper two of bytes 0 to 3 and 4 to 7.
    """
    first, second, third = packed.split(4, dim=1)
    s = torch.cat((first & 63, third & 15 | (first >> 6) << 4), dim=1)
    t = torch.cat((second & 63, third >> 4 | (second >> 6) << 4), dim=1)
    return s, t


def _pack_scales(s: Tensor, t: Tensor) -> Tensor:
    """The inverse of ``scales_q4_k``."""
    low, high = (joined(torch.stack((part[:, :4], part[:, 4:] >> 4), dim=1), 6) for part in (s, t))
    return torch.cat((low, high, joined(torch.stack((s[:, 4:] & 15, t[:, 4:] & 15), dim=1), 4)), dim=1)


def _scales_q3_k(packed: Tensor) -> Tensor:
    """The sixteen scales of Q3_K: uint8 [n, 12] -> uint8 [n, 16].

    Bytes 0 to 7 hold the lower four bits of s[0..7] and, in their upper half, of s[8..15]. Bytes 8 to 11 hold the upper
    two bits: field j of byte 8 + i belongs to s[4 j + i].
    """
    return nibbles(packed[:, :8]) | fields(packed[:, 8:], 2).flatten(1) << 4


def _scaled(d: Tensor, s: Tensor) -> Tensor:
    """Scales of sub-blocks: [n, 1] and integers [n, sub-blocks] -> float32 [n, sub-blocks, 1]."""
    return (d * s).unsqueeze(-1)


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    s, t = fields(blocks[:, :16], 4).unbind(1)
    q = _in_runs(blocks[:, 16:80], 2, 32, 16)
    return (_scaled(half(blocks, 80), s) * q - _scaled(half(blocks, 82), t)).flatten(1)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    q = _in_runs(blocks[:, 32:96], 2, 32, 16) | _in_runs(blocks[:, :32], 1, 32, 16) << 2
    s = _scales_q3_k(blocks[:, 96:108]).to(torch.int8) - 32
    return (_scaled(half(blocks, 108), s) * (q.to(torch.int8) - 4)).flatten(1)


def integers_q4_k(blocks: Tensor) -> Tensor:
    """The integers q of Q4_K: uint8 [n, 144] -> uint8 [n, 8, 32]."""
    return _in_runs(blocks[:, 16:], 4, 32, 8)


def integers_q5_k(blocks: Tensor) -> Tensor:
    """The integers q of Q5_K: uint8 [n, 176] -> uint8 [n, 8, 32]."""
    return _in_runs(blocks[:, 48:], 4, 32, 8) | _in_runs(blocks[:, 16:48], 1, 32, 8) << 4


def write_integers_q4_k(blocks: Tensor, q: Tensor) -> Tensor:
    """The same blocks of Q4_K with other integers, uint8 [n, 256]."""
    return torch.cat((blocks[:, :16], _into_runs(q.unflatten(1, (8, 32)), 4, 32)), dim=1)


def write_integers_q5_k(blocks: Tensor, q: Tensor) -> Tensor:
    """The same blocks of Q5_K with other integers, uint8 [n, 256]."""
    q = q.unflatten(1, (8, 32))
    return torch.cat((blocks[:, :16], _into_runs(q >> 4, 1, 32), _into_runs(q & 15, 4, 32)), dim=1)


def write_integers_q6_k(blocks: Tensor, q: Tensor) -> Tensor:
    """The same blocks of Q6_K with other integers, uint8 [n, 256]."""
    q = q.unflatten(1, (16, 16))
    return torch.cat((_into_runs(q & 15, 4, 64), _into_runs(q >> 4, 2, 32), blocks[:, 192:]), dim=1)


def _unpack_offset(blocks: Tensor, q: Tensor) -> Tensor:
    s, t = scales_q4_k(blocks[:, 4:16])
    return (_scaled(half(blocks, 0), s) * q - _scaled(half(blocks, 2), t)).flatten(1)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    return _unpack_offset(blocks, integers_q4_k(blocks))


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    return _unpack_offset(blocks, integers_q5_k(blocks))


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    q = _in_runs(blocks[:, :128], 4, 64, 16) | _in_runs(blocks[:, 128:192], 2, 32, 16) << 4
    s = blocks[:, 192:208].view(torch.int8)
    return (_scaled(half(blocks, 208), s) * (q.to(torch.int8) - 32)).flatten(1)


def _pack_q6_k(weights: Tensor) -> Tensor:
    d, s, codes = scaled(weights)
    return torch.cat(
        (
            _into_runs(codes & 15, 4, 64),
            _into_runs(codes >> 4, 2, 32),
            s.to(torch.int8).view(torch.uint8),
            as_bytes(d.half().view(-1, 1)),
        ),
        dim=1,
    )


def _pack_offset(weights: Tensor, bits: int) -> Tensor:
    d, e, s, t, codes = shifted(weights, 2**bits - 1)
    numbers = [as_bytes(number.half().view(-1, 1)) for number in (d, e)]
    fifth = [] if bits == 4 else [_into_runs(codes >> 4, 1, 32)]
    scales = _pack_scales(s.to(torch.uint8), t.to(torch.uint8))
    return torch.cat((*numbers, scales, *fifth, _into_runs(codes & 15, 4, 32)), dim=1)


FORMATS = (
    BlockFormat("Q2_K", 10, 256, 84, _unpack_q2_k, floats=(80, 82)),
    BlockFormat("Q3_K", 11, 256, 110, _unpack_q3_k, floats=(108,)),
    BlockFormat("Q4_K", 12, 256, 144, _unpack_q4_k, partial(_pack_offset, bits=4), floats=(0, 2)),
    BlockFormat("Q5_K", 13, 256, 176, _unpack_q5_k, partial(_pack_offset, bits=5), floats=(0, 2)),
    BlockFormat("Q6_K", 14, 256, 210, _unpack_q6_k, _pack_q6_k, floats=(208,)),
)
