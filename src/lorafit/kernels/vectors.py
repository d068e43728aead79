"""Vector instructions of LLVM, 16 lanes wide, from which the processor's kernels are written.

A compiler left alone with the bytes of a block turns them into weights one by one. Written as vectors, LLVM maps the
same arithmetic onto whatever the processor has: AVX-512, AVX2, NEON.

Two things have no such common form and are written for the processor at hand. Looking up 16 codes in a table is one
instruction of AVX-512; elsewhere that works for tables of bytes only, so wider entries are looked up byte by byte and
woven together. And processors with AVX512-BF16 round to bfloat16 in one instruction, which takes what is too small for
a normal number for zero; so it serves the formats whose weights cannot be that small, and integers serve the others.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache

from llvmlite import binding, ir

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()

_BYTE_LOOKUP = {
    "x86_64": "llvm.x86.ssse3.pshuf.b.128",
    "amd64": "llvm.x86.ssse3.pshuf.b.128",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
    "arm64": "llvm.aarch64.neon.tbl1.v16i8",
}
_WIDE_LOOKUP = {16: "llvm.x86.avx512.permvar.hi.256", 32: "llvm.x86.avx512.permvar.si.512"}
_CACHE_LINE = 64
_NAN = 0x7FC0  # in bfloat16

# Weight of a table's entry or of a block, made into what is stored: float32 as it is, or the bits of bfloat16.
Finish = Callable[[ir.Value], ir.Value]


class _BFloat(ir.Type):
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF16 = _BFloat()


@cache
def host_features() -> dict[str, bool]:
    """What the processor has, by LLVM's names."""
    return dict(binding.get_host_cpu_features())


def is_served() -> bool:
    """Whether LLVM can be asked for everything below on this processor."""
    machine = platform.machine().lower()
    # Without F16C it would look for a library's conversion of half precision, find none, and abort the process.
    return machine in _BYTE_LOOKUP and (
        _BYTE_LOOKUP[machine].startswith("llvm.aarch64") or host_features().get("f16c", False)
    )


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, value: float | Sequence[float]) -> ir.Constant:
    """A vector of one value in all lanes, or of 16 values."""
    return ir.Constant(vector(element), list(value) if isinstance(value, Sequence) else [value] * LANES)


class VectorBuilder(ir.IRBuilder):
    """LLVM's builder, with what unpacking needs. Addresses are in bytes and need no alignment."""

    def at(self, pointer: ir.Value, offset: int | ir.Value) -> ir.Value:
        """The address some bytes on."""
        index = ir.Constant(I64, offset) if isinstance(offset, int) else offset
        return self.gep(pointer, [index], source_etype=I8)

    def read(self, kind: ir.Type, pointer: ir.Value, offset: int = 0) -> ir.Value:
        """A number or vector at an address."""
        return self.load(self.at(pointer, offset), align=1, typ=kind)

    def write(self, value: ir.Value, pointer: ir.Value, offset: int = 0) -> None:
        """Store a number or vector at an address."""
        self.store(value, self.at(pointer, offset), align=1)

    def prefetch(self, pointer: ir.Value, nbytes: int, *, ahead: int, write: bool) -> None:
        """Ask for the memory some bytes on, which need not exist, before it is needed."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        for offset in range(ahead, ahead + nbytes, _CACHE_LINE):
            into_first_cache, of_data = 3, 1
            hints = [ir.Constant(I32, hint) for hint in (int(write), into_first_cache, of_data)]
            self.call(self._declared("llvm.prefetch.p0", kind), [self.at(pointer, offset), *hints])

    def half(self, pointer: ir.Value, offset: int = 0) -> ir.Value:
        """A half-precision number, as float32."""
        return self.fpext(self.read(F16, pointer, offset), F32)

    def bytes(self, pointer: ir.Value, offset: int) -> ir.Value:
        """16 bytes."""
        return self.read(vector(I8), pointer, offset)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A number in all lanes."""
        undefined = ir.Constant(vector(scalar.type), ir.Undefined)
        return self.lane(self.insert_element(undefined, scalar, ir.Constant(I32, 0)), 0)

    def lane(self, values: ir.Value, index: int) -> ir.Value:
        """One lane of a vector, in all lanes."""
        return self.shuffle_vector(values, values, constant(I32, index))

    def masked(self, integers: ir.Value, shift: int, bits: int) -> ir.Value:
        """``bits`` bits from bit ``shift`` on of every lane, or of one integer."""
        kind = integers.type

        def literal(value: int) -> ir.Constant:
            return constant(kind.element, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)

        shifted = self.lshr(integers, literal(shift)) if shift else integers
        width = kind.element.width if isinstance(kind, ir.VectorType) else kind.width
        return shifted if shift + bits == width else self.and_(shifted, literal(2**bits - 1))

    def nibbles(self, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The lower and the upper four bits of every byte."""
        return self.masked(packed, 0, 4), self.masked(packed, 4, 4)

    def shifted_in(self, integers: ir.Value, upper: ir.Value, bits: int) -> ir.Value:
        """``integers`` with those of ``upper`` above their lower ``bits`` bits."""
        return self.or_(integers, self.shl(upper, constant(integers.type.element, bits)))

    def minus(self, integers: ir.Value, value: int) -> ir.Value:
        """Subtract a number from every lane."""
        return self.sub(integers, constant(integers.type.element, value))

    def unsigned(self, integers: ir.Value) -> ir.Value:
        """Bytes 0..255 -> float32."""
        return self.sitofp(self.zext(integers, vector(I32)), vector(F32))

    def signed(self, integers: ir.Value) -> ir.Value:
        """Bytes -128..127 -> float32."""
        return self.sitofp(self.sext(integers, vector(I32)), vector(F32))

    def joined(self, words: Sequence[ir.Value]) -> ir.Value:
        """Four integers of 32 bits as 16 bytes."""
        result: ir.Value = ir.Constant(vector(I32, 4), ir.Undefined)
        for place, word in enumerate(words):
            result = self.insert_element(result, word, ir.Constant(I32, place))
        return self.bitcast(result, vector(I8))

    def halves(self, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Lanes of the two in turn, the first one's before the second one's: the lower and the upper 16 of those 32."""
        lower, upper = (
            ir.Constant(vector(I32), [start + lane // 2 + LANES * (lane % 2) for lane in range(LANES)])
            for start in (0, LANES // 2)
        )
        return self.shuffle_vector(first, second, lower), self.shuffle_vector(first, second, upper)

    def lookup(self, table: ir.Value, codes: ir.Value) -> ir.Value:
        """``table[code]`` for 16 codes (bytes 0..15) in a table of 16 entries of 16 or 32 bits."""
        width = 32 if table.type.element == F32 else table.type.element.width
        bits = self.bitcast(table, vector(ir.IntType(width)))
        features = host_features()
        if features.get("avx512bw") and features.get("avx512vl"):
            return self.bitcast(self._permuted(_WIDE_LOOKUP[width], bits, self.zext(codes, bits.type)), table.type)
        found = []
        for shift in range(0, width, 8):
            plane = self.trunc(self.lshr(bits, constant(bits.type.element, shift)), vector(I8))
            found.append(self._permuted(_BYTE_LOOKUP[platform.machine().lower()], plane, codes))
        while len(found) > 1:
            found = [self._woven(low, high) for low, high in zip(found[::2], found[1::2], strict=True)]
        return self.bitcast(found[0], table.type)

    def _permuted(self, instruction: str, table: ir.Value, codes: ir.Value) -> ir.Value:
        kind = ir.FunctionType(table.type, [table.type, codes.type])
        return self.call(self._declared(instruction, kind), [table, codes])

    def _declared(self, name: str, kind: ir.FunctionType) -> ir.Function:
        return self.module.globals.get(name) or ir.Function(self.module, kind, name)

    def _woven(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Lower and upper halves of 16 integers -> the integers."""
        width = low.type.element.width
        order = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
        both = self.shuffle_vector(low, high, ir.Constant(vector(I32, 2 * LANES), order))
        return self.bitcast(both, vector(ir.IntType(2 * width)))

    def total(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """The sum of all lanes of some vectors, added in pairs."""
        sums = list(vectors)
        while len(sums) > 1:
            sums = [self.fadd(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
        total = sums[0]
        for distance in (8, 4, 2, 1):
            moved = constant(I32, [(lane + distance) % LANES for lane in range(LANES)])
            total = self.fadd(total, self.shuffle_vector(total, total, moved))
        return self.extract_element(total, ir.Constant(I32, 0))

    def to_bfloat16(self, weights: ir.Value, *, tiny: bool) -> ir.Value:
        """float32 to the bits of bfloat16, to nearest, ties to even; ``tiny`` if some may be below 2^-126.

        A NaN is set apart, because rounding up would carry its bits to zero.
        """
        if not tiny and host_features().get("avx512bf16"):
            return self.bitcast(self.fptrunc(weights, vector(_BF16)), vector(I16))
        bits = self.bitcast(weights, vector(I32))
        odd = self.masked(bits, 16, 1)
        rounded = self.add(self.add(bits, constant(I32, 0x7FFF)), odd)
        upper = self.trunc(self.lshr(rounded, constant(I32, 16)), vector(I16))
        return self.select(self.fcmp_unordered("uno", weights, weights), constant(I16, _NAN), upper)

    def repeat(
        self,
        first: ir.Value,
        last: ir.Value,
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
        carried: Sequence[ir.Value] = (),
    ) -> list[ir.Value]:
        """``for i in range(first, last): carried = body(i, carried)``, where the range is not empty."""
        before = self.block
        inside, after = self.append_basic_block("repeat"), self.append_basic_block("after")
        self.branch(inside)
        self.position_at_end(inside)
        index = self.phi(I64)
        index.add_incoming(first, before)
        here = [self.phi(value.type) for value in carried]
        for phi, value in zip(here, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, list(here))
        following = self.add(index, ir.Constant(I64, 1))
        index.add_incoming(following, self.block)
        for phi, value in zip(here, results, strict=True):
            phi.add_incoming(value, self.block)
        self.cbranch(self.icmp_signed("<", following, last), inside, after)
        self.position_at_end(after)
        return results
