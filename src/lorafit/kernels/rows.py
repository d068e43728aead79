"""Operations on the rows of ordinary tensors, in vector code that runs in all of torch's threads.

An operation is written once, as what happens to one row, with a `RowBuilder`; it is compiled when it is first used,
for bfloat16 or for float32. Its arguments are addresses of tensors (0 for what is not there), integers and floats. Rows
are handed out to the threads as ``loops`` does it, a few at a time by an atomic counter, and no row depends on who
computes it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from lorafit.kernels import threads
from lorafit.kernels.loops import machine_code
from lorafit.kernels.vectors import F32, I16, I32, I64, LANES, POINTER, VectorBuilder, constant, vector

_CHUNKS = 4  # pieces of work for each thread
_WORTH_A_THREAD = 2**14  # elements that one thread is done with before a second one has started

# 2^f = Σ c_k f^k for |f| <= 1/2, off by 1e-7 at most: the series of e^(f ln 2).
_POWERS = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


class RowBuilder(VectorBuilder):
    """A vector builder that knows the arguments of a row operation, and the type of its tensors."""

    bfloat16: bool
    arguments: dict[str, ir.Value]
    flags: tuple[str, ...]
    room: ir.Value  # the address of working space in float32, if the operation asked for it

    def fmul(self, lhs: ir.Value, rhs: ir.Value) -> ir.Value:
        """A product."""
        return super().fmul(lhs, rhs, flags=self.flags)

    def fadd(self, lhs: ir.Value, rhs: ir.Value) -> ir.Value:
        """A sum; one instruction may take it together with a product, unless the operation is exact."""
        return super().fadd(lhs, rhs, flags=self.flags)

    def fsub(self, lhs: ir.Value, rhs: ir.Value) -> ir.Value:
        """A difference, likewise."""
        return super().fsub(lhs, rhs, flags=self.flags)

    def __getitem__(self, name: str) -> ir.Value:
        """An argument that is an integer."""
        return self.arguments[name]

    def real(self, name: str) -> ir.Value:
        """An argument that is a float, in all lanes."""
        return self.splat(self.bitcast(self.trunc(self.arguments[name], I32), F32))

    def place(self, name: str, index: ir.Value, size: int | None = None) -> ir.Value:
        """The address of an element of a tensor; of ``size`` bytes, if it is not of the operation's type."""
        width = size or (2 if self.bfloat16 else 4)
        return self.at(self.inttoptr(self.arguments[name], POINTER), self.mul(index, I64(width)))

    def get(self, place: ir.Value, vectors: ir.Value | int = 0) -> ir.Value:
        """16 elements as float32, some vectors behind an address."""
        source = self._behind(place, vectors)
        if not self.bfloat16:
            return self.read(vector(F32), source)
        bits = self.shl(self.zext(self.read(vector(I16), source), vector(I32)), constant(I32, 16))
        return self.bitcast(bits, vector(F32))

    def put(self, values: ir.Value, place: ir.Value, vectors: ir.Value | int = 0) -> None:
        """Round 16 values to the type of the tensors and store them; in bfloat16, below 2^-126 may become zero."""
        finished = self.to_bfloat16(values, tiny=False) if self.bfloat16 else values
        self.write(finished, self._behind(place, vectors))

    def keep(self, values: ir.Value, vectors: ir.Value) -> None:
        """Store 16 values in the working space."""
        self.write(values, self.at(self.room, self.mul(vectors, I64(4 * LANES))))

    def kept(self, vectors: ir.Value) -> ir.Value:
        """16 values of the working space."""
        return self.read(vector(F32), self.at(self.room, self.mul(vectors, I64(4 * LANES))))

    def one(self, place: ir.Value) -> ir.Value:
        """One element as float32, in all lanes."""
        if not self.bfloat16:
            return self.splat(self.read(F32, place))
        bits = self.shl(self.zext(self.read(I16, place), I32), I32(16))
        return self.splat(self.bitcast(bits, F32))

    def put_one(self, values: ir.Value, place: ir.Value) -> None:
        """Round the first lane to the type of the tensors and store it."""
        finished = self.to_bfloat16(values, tiny=False) if self.bfloat16 else values
        self.write(self.extract_element(finished, I32(0)), place)

    def _behind(self, place: ir.Value, vectors: ir.Value | int) -> ir.Value:
        width = LANES * (2 if self.bfloat16 else 4)
        return self.at(place, vectors * width if isinstance(vectors, int) else self.mul(vectors, I64(width)))

    def span(
        self,
        first: ir.Value,
        last: ir.Value,
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
        *carried: ir.Value,
    ) -> list[ir.Value]:
        """``for i in range(first, last): carried = body(i, carried)``; the range may be empty."""
        before = self.block
        check, inside, after = (self.append_basic_block(step) for step in ("check", "inside", "after"))
        self.branch(check)
        self.position_at_end(check)
        index = self.phi(I64)
        here = [self.phi(value.type) for value in carried]
        for phi, value in zip([index, *here], [first, *carried], strict=True):
            phi.add_incoming(value, before)
        self.cbranch(self.icmp_signed("<", index, last), inside, after)
        self.position_at_end(inside)
        results = [self.add(index, I64(1)), *body(index, list(here))]
        for phi, value in zip([index, *here], results, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(check)
        self.position_at_end(after)
        return list(here)

    def each(
        self, count: ir.Value, body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]], *carried: ir.Value
    ) -> list[ir.Value]:
        """``for i in range(count): carried = body(i, carried)``."""
        return self.span(I64(0), count, body, *carried)

    def sum(self, values: ir.Value) -> ir.Value:
        """The sum of all lanes, in all lanes."""
        return self.splat(self.total([values]))

    def maximum(self, values: ir.Value) -> ir.Value:
        """The largest lane, in all lanes."""
        return self._across(values, self.larger)

    def minimum(self, values: ir.Value) -> ir.Value:
        """The smallest lane, in all lanes."""
        return self._across(values, self.smaller)

    def _across(self, values: ir.Value, choose: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        for distance in (8, 4, 2, 1):
            moved = constant(I32, [(lane + distance) % LANES for lane in range(LANES)])
            values = choose(values, self.shuffle_vector(values, values, moved))
        return values

    def larger(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """The larger of two in each lane; of a NaN and a number, the second."""
        return self.select(self.fcmp_ordered(">", one, other), one, other)

    def smaller(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """The smaller of two in each lane; of a NaN and a number, the second."""
        return self.select(self.fcmp_ordered("<", one, other), one, other)

    def inverse(self, values: ir.Value) -> ir.Value:
        """1/x, off by 2e-7 of it, for x that are neither zero nor infinite."""
        return self.fdiv(constant(F32, 1.0), values, flags=("arcp", "contract"))

    def nearest(self, values: ir.Value) -> ir.Value:
        """Rounded to whole numbers, ties to even."""
        return self._call("llvm.rint.v16f32", values)

    def root(self, values: ir.Value) -> ir.Value:
        """Square roots."""
        return self._call("llvm.sqrt.v16f32", values)

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x, off by 2e-7 of it; 2^±126 where it would be beyond, NaN of NaN."""
        t = self.fmul(x, constant(F32, 1.4426950408889634))
        for limit, beyond in ((-126.0, "<"), (126.0, ">")):
            t = self.select(self.fcmp_ordered(beyond, t, constant(F32, limit)), constant(F32, limit), t)
        whole = self._call("llvm.floor.v16f32", self.fadd(t, constant(F32, 0.5)))
        part = self.fsub(t, whole)
        power: ir.Value = constant(F32, _POWERS[0])
        for coefficient in _POWERS[1:]:
            power = self.fadd(self.fmul(power, part), constant(F32, coefficient))
        exponent = self.shl(self.add(self.fptosi(whole, vector(I32)), constant(I32, 127)), constant(I32, 23))
        return self.fmul(power, self.bitcast(exponent, vector(F32)))

    def _call(self, name: str, values: ir.Value) -> ir.Value:
        kind = ir.FunctionType(values.type, [values.type])
        declared = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.call(declared, [values])


class RowOperation:
    """Something done to every row.

    Args:
        name: What it is called.
        arguments: Names of its arguments.
        body: Writes the code for one row; gets the builder and the row's number.
        room: The argument that says how many floats of working space a row needs.
        exact: Whether the results must be the same bits on every processor.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        body: Callable[[RowBuilder, ir.Value], None],
        *,
        room: str | None = None,
        exact: bool = False,
    ) -> None:
        self.name = name
        self.exact = exact
        self.room = room
        self.arguments = tuple(arguments)
        self.body = body
        self._code = cache(self._compile)
        self._task = ctypes.c_int64 * (3 + len(self.arguments))

    def __call__(self, rows: int, width: int, dtype: torch.dtype, *values: Tensor | int | float | None) -> None:
        """Run it.

        Args:
            rows: How many.
            width: About how many elements each has.
            dtype: Type of the tensors, bfloat16 or float32.
            values: The arguments; tensors must be contiguous.
        """
        if rows == 0:
            return
        assert len(values) == len(self.arguments)
        workers = min(torch.get_num_threads(), 1 + rows * width // _WORTH_A_THREAD)
        chunk = -(-rows // (workers * _CHUNKS))
        task = self._task(0, rows, chunk, *(_as_integer(value) for value in values))
        threads.run(self._code(dtype == torch.bfloat16), ctypes.addressof(task), workers)

    def _compile(self, bfloat16: bool) -> int:
        module = ir.Module(self.name)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), self.name)
        entry, take, work, done = (function.append_basic_block(step) for step in ("entry", "take", "work", "done"))
        v = RowBuilder(entry)
        v.bfloat16 = bfloat16
        v.flags = () if self.exact else ("contract",)
        task = function.args[0]
        count, chunk = v.read(I64, task, 8), v.read(I64, task, 16)
        v.arguments = {name: v.read(I64, task, 8 * place) for place, name in enumerate(self.arguments, 3)}
        if self.room is not None:
            v.room = v.inttoptr(v.ptrtoint(v.alloca(F32, size=v[self.room]), I64), POINTER)
        v.branch(take)
        v.position_at_end(take)
        first = v.atomic_rmw("add", task, chunk, "monotonic")
        v.cbranch(v.icmp_signed("<", first, count), work, done)
        v.position_at_end(work)
        last = v.add(first, chunk)

        def one_row(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            self.body(v, row)
            return []

        v.repeat(first, v.select(v.icmp_signed("<", last, count), last, count), one_row)
        v.branch(take)
        v.position_at_end(done)
        v.ret_void()
        return machine_code(str(module), self.name)


def _as_integer(value: Tensor | int | float | None) -> int:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else value
