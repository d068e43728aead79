"""Vector code for the processor, compiled by numba on the user's machine.

A compiler left alone with the bytes of a block turns them into weights one by one. So the inner part is written as
vector instructions of LLVM, 16 lanes wide: load 16 bytes, mask or shift out the integers, convert, multiply by the
block's scale and add its offset; then round to bfloat16 and store, or multiply by 16 inputs and accumulate. LLVM maps
them onto whatever the processor has (AVX-512, AVX2, NEON).

The offset comes from the block, or from ``offsets`` where the caller brings other ones (QA-LoRA). float32 to bfloat16
rounds to nearest, ties to even, as torch does; a NaN is set apart, because rounding up would carry its bits to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from lorafit.formats import block_format

if not torch.cpu.get_capabilities().get("f16c", True):
    # LLVM would look for a library's conversion of half precision, find none, and abort the process.
    raise ImportError("this processor does not convert half precision; lorafit computes without compiled code")

_LANES = 16
_NAN = 0x7FC0  # in bfloat16
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, _LANES)


def _constant(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * _LANES)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(_vector(scalar.type), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_I32, 0))


def _at(builder: ir.IRBuilder, pointer: ir.Value, index: int) -> ir.Value:
    return builder.gep(pointer, [ir.Constant(_I64, index)])


def _half(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    """The half-precision number at a byte address, in all lanes, as float32."""
    bits = builder.load(builder.bitcast(pointer, _I16.as_pointer()), align=1)
    return _splat(builder, builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32))


def _bytes(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, _vector(_I8).as_pointer()), align=1)


def _q4_1(builder: ir.IRBuilder, block: ir.Value, offset: ir.Value | None) -> list[ir.Value]:
    """The 32 weights of a Q4_1 block as two vectors of float32."""
    scale = _half(builder, block)
    offset = _half(builder, _at(builder, block, 2) if offset is None else offset)
    packed = _bytes(builder, _at(builder, block, 4))
    integers = (builder.and_(packed, _constant(_I8, 15)), builder.lshr(packed, _constant(_I8, 4)))
    weights = []
    for q in integers:
        as_float = builder.uitofp(builder.zext(q, _vector(_I32)), _vector(_F32))
        weights.append(builder.fadd(builder.fmul(as_float, scale), offset))
    return weights


def _q8_0(builder: ir.IRBuilder, block: ir.Value, offset: ir.Value | None) -> list[ir.Value]:
    """The 32 weights of a Q8_0 block as two vectors of float32."""
    assert offset is None, "Q8_0 has no offset"
    scale = _half(builder, block)
    weights = []
    for start in (2, 2 + _LANES):
        q = builder.sext(_bytes(builder, _at(builder, block, start)), _vector(_I32))
        weights.append(builder.fmul(builder.sitofp(q, _vector(_F32)), scale))
    return weights


# The array of blocks that a kernel gets is an array of records whose one field is called like the format, so that the
# type of the array tells which code unpacks it, and one kernel, compiled and cached by type, serves every format.
_UNPACK = {"Q4_1": _q4_1, "Q8_0": _q8_0}


def _element(context: Any, builder: ir.IRBuilder, kind: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _block_weights(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> list[ir.Value]:
    """Unpack block ``args[1]`` of the array ``args[0]``, with offset ``args[3]`` of ``args[2]`` or with its own."""
    kinds = signature.args
    (format_name,) = kinds[0].dtype.fields
    block = builder.bitcast(_element(context, builder, kinds[0], args[0], args[1]), _I8.as_pointer())
    offset = None
    if not isinstance(kinds[2], types.NoneType):
        offset = builder.bitcast(_element(context, builder, kinds[2], args[2], args[3]), _I8.as_pointer())
    return _UNPACK[format_name](builder, block, offset)


def _bfloat16_bits(builder: ir.IRBuilder, weights: ir.Value) -> ir.Value:
    bits = builder.bitcast(weights, _vector(_I32))
    odd = builder.and_(builder.lshr(bits, _constant(_I32, 16)), _constant(_I32, 1))
    rounded = builder.add(builder.add(bits, _constant(_I32, 0x7FFF)), odd)
    upper = builder.trunc(builder.lshr(rounded, _constant(_I32, 16)), _vector(_I16))
    return builder.select(builder.fcmp_unordered("uno", weights, weights), _constant(_I16, _NAN), upper)


@intrinsic
def _store_block(typing: Any, blocks: Any, block: Any, offsets: Any, offset: Any, out: Any, at: Any) -> Any:
    """Unpack a block into ``out[at:]``, float32 or the bits of bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[4]
        target = _element(context, builder, kind, args[4], args[5])
        for part, weights in enumerate(_block_weights(context, builder, signature, args)):
            value = _bfloat16_bits(builder, weights) if kind.dtype == types.uint16 else weights
            place = _at(builder, target, part * _LANES)
            builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(blocks, block, offsets, offset, out, at), generate


@intrinsic
def _add_products(typing: Any, blocks: Any, block: Any, offsets: Any, offset: Any, x: Any, at: Any, sums: Any) -> Any:
    """Add the products of a block's weights and ``x[at:]`` to the 16 partial ``sums``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        as_vector = _vector(_F32).as_pointer()
        source = _element(context, builder, signature.args[4], args[4], args[5])
        address = _element(context, builder, signature.args[6], args[6], ir.Constant(_I64, 0))
        address = builder.bitcast(address, as_vector)
        total = builder.load(address, align=4)
        for part, weights in enumerate(_block_weights(context, builder, signature, args)):
            inputs = builder.load(builder.bitcast(_at(builder, source, part * _LANES), as_vector), align=4)
            total = builder.fadd(total, builder.fmul(weights, inputs))
        builder.store(total, address, align=4)
        return context.get_dummy_value()

    return types.void(blocks, block, offsets, offset, x, at, sums), generate


def _compiled(function: Callable[..., None]) -> Any:
    """The function in machine code, kept on disk for the next process unless no place for that can be written to."""
    options = {"parallel": True, "boundscheck": False}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


@_compiled
def _dequantize_rows(blocks: Any, rows: Any, offsets: Any, groups: int, elements: int, out: Any) -> None:
    for row in prange(rows.shape[0]):
        for group in range(groups):
            here = row * groups + group
            _store_block(blocks, rows[row] * groups + group, offsets, here, out, here * elements)


@_compiled
def _linear_rows(x: Any, blocks: Any, rows: Any, offsets: Any, groups: int, elements: int, out: Any) -> None:
    for row in prange(rows.shape[0]):
        sums = np.empty(_LANES, np.float32)
        for token in range(out.shape[0]):
            sums[:] = 0.0
            for group in range(groups):
                block, offset = rows[row] * groups + group, row * groups + group
                _add_products(blocks, block, offsets, offset, x, (token * groups + group) * elements, sums)
            out[token, row] = sums.sum()


def supports(format_name: str, dtype: torch.dtype) -> bool:
    """Whether this backend has the format and can write the type."""
    return format_name in _UNPACK and dtype in (torch.bfloat16, torch.float32)


def dequantize(
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
    out: Tensor,
) -> None:
    """Write the weight into ``out`` [rows, width], bfloat16 or float32."""
    assert constants is None, f"{format_name} has no constants"
    target = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
    _follow_torch_threads()
    order, elements = _order(rows, out.shape[0]), block_format(format_name).elements
    groups = out.shape[1] // elements
    _dequantize_rows(_records(blocks, format_name), order, _bits(offsets), groups, elements, target.numpy().reshape(-1))


def linear(
    x: Tensor,
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
) -> Tensor:
    """x·Wᵀ: [tokens, width] -> [tokens, rows] in the type of ``x``."""
    assert constants is None, f"{format_name} has no constants"
    order, elements = _order(rows, blocks.shape[0]), block_format(format_name).elements
    out = np.empty((x.shape[0], len(order)), np.float32)
    inputs = x.float().contiguous().numpy().reshape(-1)
    _follow_torch_threads()
    groups = x.shape[1] // elements
    _linear_rows(inputs, _records(blocks, format_name), order, _bits(offsets), groups, elements, out)
    return torch.from_numpy(out).to(x.dtype)


def _follow_torch_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@cache
def _record(format_name: str) -> np.dtype:
    return np.dtype([(format_name, "u1", block_format(format_name).nbytes)])


def _records(blocks: Tensor, format_name: str) -> np.ndarray:
    return blocks.numpy().reshape(-1).view(_record(format_name))


@cache
def _natural_order(count: int) -> np.ndarray:
    return np.arange(count)


def _order(rows: Tensor | None, count: int) -> np.ndarray:
    return _natural_order(count) if rows is None else rows.long().contiguous().numpy()


def _bits(offsets: Tensor | None) -> np.ndarray | None:
    return None if offsets is None else offsets.contiguous().view(torch.uint16).numpy().reshape(-1)
