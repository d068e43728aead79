"""How each block format is unpacked: the vector code that turns one block into weights, 16 at a time.

The arithmetic is that of ``lorafit.formats``, operation by operation, so that the weights have the same bits; the
layouts are explained there. A format that looks weights up in a table of 16 multiplies, and rounds, the 16 entries
rather than the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from lorafit.formats.nf4 import DYNAMIC
from lorafit.kernels.tables import table_of
from lorafit.kernels.vectors import F16, F32, I1, I8, I16, I32, I64, LANES, Finish, VectorBuilder, constant, vector


class Block(NamedTuple):
    """Where one block is, and what belongs to it.

    Attributes:
        at: Its address.
        number: Its place in the tensor.
        offset: Address of the half that stands for its offset; None if that is in the block.
        constants: Address of the constants of double quantisation.
    """

    at: ir.Value
    number: ir.Value
    offset: ir.Value | None
    constants: ir.Value


Unpack = Callable[[VectorBuilder, Block, Finish], Iterator[ir.Value]]


@dataclass(frozen=True)
class Unpacker:
    """Vector code for a format.

    Attributes:
        elements: Weights that it unpacks at a time.
        nbytes: Bytes that those take.
        unpack: Writes the code; yields vectors of 16 finished weights.
        tiny: Whether a weight may be smaller than a normal float32. Integers times a half-precision number are not.
    """

    elements: int
    nbytes: int
    unpack: Unpack
    tiny: bool = False


def _floats(kind: ir.Type) -> Unpack:
    def unpack(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
        numbers = v.read(vector(kind), block.at)
        if kind == F16:
            numbers = v.fpext(numbers, vector(F32))
        elif kind == I16:  # bfloat16 is the upper half of a float32
            numbers = v.bitcast(v.shl(v.zext(numbers, vector(I32)), constant(I32, 16)), vector(F32))
        yield finish(numbers)

    return unpack


def _simple(bits: int, *, offset: bool) -> Unpack:
    """Q4_0, Q4_1, Q5_0, Q5_1: a scale, perhaps an offset, the fifth bits, the lower four."""
    centre, start = 2 ** (bits - 1), 4 if offset else 2

    def unpack(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
        d = v.splat(v.half(block.at))
        if offset:
            m = v.splat(v.half(block.at, 2) if block.offset is None else v.half(block.offset))
        packed = v.bytes(block.at, start if bits == 4 else start + 4)
        for half, q in enumerate(v.nibbles(packed)):
            if bits == 5:
                fifth = v.bitcast(v.read(I16, block.at, start + 2 * half), vector(I1))
                q = v.or_(q, v.select(fifth, constant(I8, 16), constant(I8, 0)))
            if offset:
                yield finish(v.fadd(v.fmul(d, v.unsigned(q)), m))
            else:
                yield finish(v.fmul(d, v.signed(v.minus(q, centre))))

    return unpack


def _q8_0(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    d = v.splat(v.half(block.at))
    for start in (2, 2 + LANES):
        yield finish(v.fmul(d, v.signed(v.bytes(block.at, start))))


def _q2_k(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    d, dmin = v.splat(v.half(block.at, 80)), v.splat(v.half(block.at, 82))
    low, high = v.nibbles(v.bytes(block.at, 0))
    scales, offsets = v.fmul(d, v.unsigned(low)), v.fmul(dmin, v.unsigned(high))
    for part in range(16):
        packed = v.bytes(block.at, 16 + part // 8 * 32 + part % 2 * 16)
        q = v.unsigned(v.masked(packed, part % 8 // 2 * 2, 2))
        yield finish(v.fsub(v.fmul(v.lane(scales, part), q), v.lane(offsets, part)))


def _q3_k(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    low = [v.read(I32, block.at, 96), v.read(I32, block.at, 100)]
    high = v.read(I32, block.at, 104)
    words = []
    for part in range(4):  # four scales of six bits in each word
        lower = v.and_(_shifted(v, low[part % 2], part // 2 * 4), _bytewise(0x0F))
        upper = v.and_(_shifted(v, high, part * 2), _bytewise(0x03))
        words.append(v.or_(lower, v.shl(upper, ir.Constant(I32, 4))))
    scales = v.fmul(v.splat(v.half(block.at, 108)), v.signed(v.minus(v.joined(words), 32)))
    for part in range(16):
        packed = v.masked(v.bytes(block.at, 32 + part // 8 * 32 + part % 2 * 16), part % 8 // 2 * 2, 2)
        third = v.masked(v.bytes(block.at, part % 2 * 16), part // 2, 1)
        q = v.signed(v.minus(v.shifted_in(packed, third, 2), 4))
        yield finish(v.fmul(v.lane(scales, part), q))


def _q4_q5_k(bits: int) -> Unpack:
    """Q4_K and Q5_K: twelve bytes hold the scales and offsets of eight sub-blocks, six bits each."""

    def unpack(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
        scale, offset, rest = (v.read(I32, block.at, start) for start in (4, 8, 12))
        words = []
        for first, shift in ((scale, 0), (offset, 4)):
            lower = v.and_(_shifted(v, rest, shift), _bytewise(0x0F))
            upper = v.and_(_shifted(v, first, 2), _bytewise(0x30))
            words += [v.and_(first, _bytewise(0x3F)), v.or_(lower, upper)]
        factors = v.shuffle_vector(  # d for the first eight lanes, dmin for the others
            v.splat(v.half(block.at)), v.splat(v.half(block.at, 2)), constant(I32, [0] * 8 + [LANES] * 8)
        )
        factors = v.fmul(factors, v.unsigned(v.joined(words)))
        codes = 16 if bits == 4 else 48
        for part in range(16):
            sub = part // 2
            q = v.masked(v.bytes(block.at, codes + sub // 2 * 32 + part % 2 * 16), sub % 2 * 4, 4)
            if bits == 5:
                q = v.shifted_in(q, v.masked(v.bytes(block.at, 16 + part % 2 * 16), sub, 1), 4)
            yield finish(v.fsub(v.fmul(v.lane(factors, sub), v.unsigned(q)), v.lane(factors, 8 + sub)))

    return unpack


def _q6_k(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    scales = v.fmul(v.splat(v.half(block.at, 208)), v.signed(v.bytes(block.at, 192)))
    for part in range(16):
        half, sub = part // 8, part % 8 // 2
        low = v.masked(v.bytes(block.at, half * 64 + sub % 2 * 32 + part % 2 * 16), sub // 2 * 4, 4)
        high = v.masked(v.bytes(block.at, 128 + half * 32 + part % 2 * 16), sub * 2, 2)
        q = v.signed(v.minus(v.shifted_in(low, high, 4), 32))
        yield finish(v.fmul(v.lane(scales, part), q))


def _bytewise(value: int) -> ir.Constant:
    """A number in each byte of 32 bits."""
    return ir.Constant(I32, value * 0x01010101)


def _shifted(v: VectorBuilder, word: ir.Value, shift: int) -> ir.Value:
    return v.lshr(word, ir.Constant(I32, shift)) if shift else word


def _from_table(
    v: VectorBuilder, scale: ir.Value, table: ir.Value, packed: ir.Value, finish: Finish
) -> Iterator[ir.Value]:
    """16 bytes of codes, the lower halves first: scale · table[code]."""
    entries = finish(v.fmul(scale, table))
    for codes in v.nibbles(packed):
        yield v.lookup(entries, codes)


def _iq4_nl(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    yield from _from_table(
        v, v.splat(v.half(block.at)), constant(F32, table_of("IQ4_NL")), v.bytes(block.at, 2), finish
    )


def _iq4_xs(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    every = range(LANES)
    low = v.lshr(v.splat(v.read(I32, block.at, 4)), constant(I32, [i % 8 * 4 for i in every]))
    high = v.lshr(v.splat(v.zext(v.read(I16, block.at, 2), I32)), constant(I32, [i % 8 * 2 for i in every]))
    s = v.minus(v.shifted_in(v.masked(low, 0, 4), v.masked(high, 0, 2), 4), 32)
    scales = v.fmul(v.splat(v.half(block.at)), v.sitofp(s, vector(F32)))
    for sub in range(8):
        packed = v.bytes(block.at, 8 + 16 * sub)
        yield from _from_table(v, v.lane(scales, sub), constant(F32, table_of("IQ4_NL")), packed, finish)


def _mxfp4(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
    e = v.zext(v.read(I8, block.at), I32)
    normal = v.shl(v.sub(e, ir.Constant(I32, 1)), ir.Constant(I32, 23))
    small = v.shl(ir.Constant(I32, 1 << 21), v.and_(e, ir.Constant(I32, 1)))  # 2^-128 and 2^-127
    power = v.bitcast(v.select(v.icmp_unsigned("<", e, ir.Constant(I32, 2)), small, normal), F32)
    yield from _from_table(v, v.splat(power), constant(F32, table_of("MXFP4")), v.bytes(block.at, 1), finish)


def _nf4(name: str, *, double: bool) -> Unpack:
    """NF4 and FP4, whose bytes hold the earlier weight in their upper half."""

    def absmax(v: VectorBuilder, block: Block) -> ir.Value:
        if not double:
            return v.read(F32, block.at)
        code = v.zext(v.read(I8, block.at), I64)
        dynamic = v.read(F32, v.at(_dynamic(v.module), v.mul(code, ir.Constant(I64, 4))))
        shared = v.mul(v.lshr(block.number, ir.Constant(I64, 8)), ir.Constant(I64, 4))
        scale, mean = v.read(F32, v.at(block.constants, shared), 4), v.read(F32, block.constants)
        return v.fadd(v.fmul(dynamic, scale), mean)

    def unpack(v: VectorBuilder, block: Block, finish: Finish) -> Iterator[ir.Value]:
        entries = finish(v.fmul(v.splat(absmax(v, block)), constant(F32, table_of(name))))
        start = 1 if double else 4
        for packed in (v.bytes(block.at, start), v.bytes(block.at, start + LANES)):
            low, high = v.nibbles(packed)
            for codes in v.halves(high, low):
                yield v.lookup(entries, codes)

    return unpack


def _dynamic(module: ir.Module) -> ir.Value:
    """The table of bitsandbytes' 8-bit codes, in the module."""
    if "dynamic" not in module.globals:
        values = ir.ArrayType(F32, len(DYNAMIC))
        table = ir.GlobalVariable(module, values, "dynamic")
        table.initializer = ir.Constant(values, DYNAMIC.tolist())
        table.global_constant, table.linkage = True, "internal"
    return module.globals["dynamic"]


UNPACKERS = {
    "F32": Unpacker(16, 64, _floats(F32), tiny=True),
    "F16": Unpacker(16, 32, _floats(F16)),
    "BF16": Unpacker(16, 32, _floats(I16), tiny=True),
    "Q4_0": Unpacker(32, 18, _simple(4, offset=False)),
    "Q4_1": Unpacker(32, 20, _simple(4, offset=True)),
    "Q5_0": Unpacker(32, 22, _simple(5, offset=False)),
    "Q5_1": Unpacker(32, 24, _simple(5, offset=True)),
    "Q8_0": Unpacker(32, 34, _q8_0),
    "Q2_K": Unpacker(256, 84, _q2_k),
    "Q3_K": Unpacker(256, 110, _q3_k),
    "Q4_K": Unpacker(256, 144, _q4_q5_k(4)),
    "Q5_K": Unpacker(256, 176, _q4_q5_k(5)),
    "Q6_K": Unpacker(256, 210, _q6_k),
    "IQ4_NL": Unpacker(32, 18, _iq4_nl),
    "IQ4_XS": Unpacker(256, 136, _iq4_xs),
    "MXFP4": Unpacker(32, 17, _mxfp4, tiny=True),
    "NF4": Unpacker(64, 36, _nf4("NF4", double=False), tiny=True),
    "FP4": Unpacker(64, 36, _nf4("FP4", double=False), tiny=True),
    "NF4_DQ": Unpacker(64, 33, _nf4("NF4", double=True), tiny=True),
    "FP4_DQ": Unpacker(64, 33, _nf4("FP4", double=True), tiny=True),
}
