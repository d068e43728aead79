"""Dequantisation on a GPU, in Triton.

One program unpacks a tile of blocks; each weight's own code finds the bytes that hold it, which the processor's cache
makes cheap. The arithmetic is that of ``lorafit.formats``, without fused multiply-adds, so that the weights have the
same bits. A row that does not exist becomes NaN, because refusing it would make the host wait for the device; a NaN
loss stops training.

Triton comes with torch where there is a GPU that it serves. Its interpreter (``TRITON_INTERPRET=1``) runs the same
code on a processor, which is how the tests compare it where there is no GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafit.formats import block_format
from lorafit.formats.nf4 import DYNAMIC
from lorafit.kernels.tables import table_of

_TILE = 1024  # weights that a program unpacks
COMPILED = {"enable_fp_fusion": False}
# Not those that are plain numbers, which torch converts as fast as anything.
_FORMATS = {
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "NF4", "FP4", "NF4_DQ", "FP4_DQ",
}  # fmt: skip


def supports(format_name: str, dtype: torch.dtype) -> bool:
    """Whether this backend has the format and can write the type."""
    return format_name in _FORMATS and dtype in (torch.bfloat16, torch.float16, torch.float32)


def dequantize(
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
    out: Tensor,
) -> None:
    """Write the weight into ``out`` [rows, width]."""
    block = block_format(format_name)
    groups = blocks.shape[1] // block.nbytes
    total = out.shape[0] * groups
    if total == 0:
        return
    tile = max(1, _TILE // block.elements)
    table, dynamic = _tables(format_name, blocks.device)
    launch = unpack_tile[(triton.cdiv(total, tile),)]
    # What is not there is not read either; something must stand for its address.
    arguments = (
        blocks.contiguous(),
        blocks if rows is None else rows.contiguous(),
        blocks if offsets is None else offsets.contiguous(),
        blocks if constants is None else constants.contiguous(),
        table,
        dynamic,
        out,
        total,
        groups,
        blocks.shape[0],
        format_name,
        block.elements,
        block.nbytes,
        rows is not None,
        offsets is not None,
        tile,
    )
    with torch.cuda.device_of(blocks):
        launch(*arguments, **COMPILED)


@cache
def _tables(format_name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 weights that codes stand for, and the 256 of double quantisation; anything for formats without."""
    table = torch.tensor(table_of(format_name), device=device)
    return table, DYNAMIC.to(device)


@triton.jit
def unpack_tile(
    blocks,
    rows,
    offsets,
    constants,
    table,
    dynamic,
    out,
    total,
    groups,
    height,
    format_name: tl.constexpr,
    elements: tl.constexpr,
    nbytes: tl.constexpr,
    has_rows: tl.constexpr,
    has_offsets: tl.constexpr,
    tile: tl.constexpr,
):
    """Unpack ``tile`` of the ``total`` blocks that the result has."""
    here = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = here < total
    row = here // groups
    if has_rows:
        row = tl.load(rows + row, mask=inside, other=0).to(tl.int64)
    there = inside & (row >= 0) & (row < height)
    number = tl.where(there, row * groups + here % groups, 0)
    block = (blocks + number * nbytes)[:, None]
    e = tl.arange(0, elements)[None, :]
    if has_offsets:
        m = tl.load(offsets + here, mask=inside, other=0).to(tl.float32)[:, None]
    elif format_name == "Q4_1" or format_name == "Q5_1":
        m = _half(block, 2)
    if format_name == "Q4_0":
        weights = _half(block, 0) * (_nibble(block, 2, e) - 8).to(tl.float32)
    elif format_name == "Q4_1":
        weights = _half(block, 0) * _nibble(block, 4, e).to(tl.float32) + m
    elif format_name == "Q5_0":
        weights = _half(block, 0) * ((_nibble(block, 6, e) | _bit(block, 2, e) << 4) - 16).to(tl.float32)
    elif format_name == "Q5_1":
        weights = _half(block, 0) * (_nibble(block, 8, e) | _bit(block, 4, e) << 4).to(tl.float32) + m
    elif format_name == "Q8_0":
        weights = _half(block, 0) * _signed(_byte(block, 2 + e))
    elif format_name == "Q2_K":
        weights = _q2_k(block, e)
    elif format_name == "Q3_K":
        weights = _q3_k(block, e)
    elif format_name == "Q4_K":
        weights = _q4_q5_k(block, e, _field(block, 16 + e // 64 * 32, e % 32, e // 32 % 2 * 4, 15))
    elif format_name == "Q5_K":
        q = _field(block, 48 + e // 64 * 32, e % 32, e // 32 % 2 * 4, 15) | _field(block, 16, e % 32, e // 32, 1) << 4
        weights = _q4_q5_k(block, e, q)
    elif format_name == "Q6_K":
        weights = _q6_k(block, e)
    elif format_name == "IQ4_NL":
        weights = _half(block, 0) * tl.load(table + _nibble(block, 2, e))
    elif format_name == "IQ4_XS":
        weights = _iq4_xs(block, e, table)
    elif format_name == "MXFP4":
        weights = _power(_byte(block, 0)) * tl.load(table + _nibble(block, 1, e))
    elif format_name == "NF4" or format_name == "FP4":
        absmax = tl.load(block.to(tl.pointer_type(tl.float32)))
        weights = absmax * tl.load(table + _field(block, 4, e // 2, 4 - e % 2 * 4, 15))
    else:
        tl.static_assert(format_name == "NF4_DQ" or format_name == "FP4_DQ")
        scale = tl.load(constants + 1 + number // 256)[:, None]
        absmax = tl.load(dynamic + _byte(block, 0)) * scale + tl.load(constants)
        weights = absmax * tl.load(table + _field(block, 1, e // 2, 4 - e % 2 * 4, 15))
    weights = tl.where(there[:, None], weights, float("nan"))
    place = here[:, None] * elements + e
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _byte(block, at):
    return tl.load(block + at).to(tl.int32)


@triton.jit
def _signed(byte):
    return byte.to(tl.int8).to(tl.float32)


@triton.jit
def _half(block, at):
    return tl.load((block + at).to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _field(block, start, byte, shift, mask):
    """Some bits of a byte."""
    return _byte(block, start + byte) >> shift & mask


@triton.jit
def _nibble(block, start, e):
    """Four bits of weight e of 32, whose 16 bytes hold the earlier weights in their lower halves."""
    return _field(block, start, e % 16, e // 16 * 4, 15)


@triton.jit
def _bit(block, start, e):
    return _field(block, start, e // 8, e % 8, 1)


@triton.jit
def _q2_k(block, e):
    scale = _byte(block, e // 16)
    q = _field(block, 16 + e // 128 * 32, e % 32, e % 128 // 32 * 2, 3).to(tl.float32)
    return _half(block, 80) * (scale & 15).to(tl.float32) * q - _half(block, 82) * (scale >> 4).to(tl.float32)


@triton.jit
def _q3_k(block, e):
    sub = e // 16
    scale = _field(block, 96, sub % 8, sub // 8 * 4, 15) | _field(block, 104, sub % 4, sub // 4 * 2, 3) << 4
    low = _field(block, 32 + e // 128 * 32, e % 32, e % 128 // 32 * 2, 3)
    q = (low | _field(block, 0, e % 32, e // 32, 1) << 2) - 4
    return _half(block, 108) * (scale - 32).to(tl.float32) * q.to(tl.float32)


@triton.jit
def _q4_q5_k(block, e, q):
    sub = e // 32
    first, second, rest = _byte(block, 4 + sub % 4), _byte(block, 8 + sub % 4), _byte(block, 12 + sub % 4)
    scale = tl.where(sub < 4, first & 63, (rest & 15) | (first >> 6) << 4).to(tl.float32)
    offset = tl.where(sub < 4, second & 63, (rest >> 4) | (second >> 6) << 4).to(tl.float32)
    return _half(block, 0) * scale * q.to(tl.float32) - _half(block, 2) * offset


@triton.jit
def _q6_k(block, e):
    low = _field(block, e // 128 * 64, e % 64, e % 128 // 64 * 4, 15)
    q = (low | _field(block, 128 + e // 128 * 32, e % 32, e % 128 // 32 * 2, 3) << 4) - 32
    return _half(block, 208) * _signed(_byte(block, 192 + e // 16)) * q.to(tl.float32)


@triton.jit
def _iq4_xs(block, e, table):
    sub = e // 32
    scale = _field(block, 4, sub // 2, sub % 2 * 4, 15) | _field(block, 2, sub // 4, sub % 4 * 2, 3) << 4
    code = _nibble(block, 8 + 16 * sub, e % 32)
    return _half(block, 0) * (scale - 32).to(tl.float32) * tl.load(table + code)


@triton.jit
def _power(e):
    """2^(e - 128); the two smallest are not normal numbers."""
    bits = tl.where(e < 2, 1 << (21 + e), (e - 1) << 23)
    return bits.to(tl.float32, bitcast=True)
