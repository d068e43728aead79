"""The loops around the vector code of one block, compiled into functions that any number of threads run at once.

A function gets the address of a task: int64 numbers, ``FIELDS`` tells which. The first counts the rows that were taken
so far. Every thread takes the next few rows, by an atomic addition, until none are left; so a thread that starts late
or loses its core delays nobody, and who computes a row changes nothing in it.

Compiling takes some 20 milliseconds for each format and kind of arguments that a process meets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import binding, ir

from lorafit.kernels.unpackers import UNPACKERS, Block
from lorafit.kernels.vectors import F32, I64, LANES, POINTER, VectorBuilder, constant, host_features, vector

# Addresses are 0 for what is not there. ``chunk`` rows are taken at a time, a row has ``groups`` blocks, and ``x`` of
# float32 has ``tokens`` rows.
FIELDS = ("taken", "count", "chunk", "groups", "blocks", "rows", "offsets", "constants", "x", "tokens", "out")
# A weight comes from memory and goes to memory, and a processor left alone looks ahead too late: asking for what comes
# next, this many bytes on, took a third off the time of weights that no cache held.
_READ_AHEAD, _WRITE_AHEAD = 2048, 1024
_SUMS = 4  # partial sums, so that an addition need not wait for the one before

_engines: list[binding.ExecutionEngine] = []  # which own the code


class _Task:
    """The numbers of a task, as the code sees them."""

    def __init__(self, v: VectorBuilder, pointer: ir.Value) -> None:
        self.values = {name: v.read(I64, pointer, 8 * place) for place, name in enumerate(FIELDS)}
        self.pointer = pointer
        self.v = v

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def address(self, name: str) -> ir.Value:
        return self.v.inttoptr(self.values[name], POINTER)


@cache
def dequantizer(format_name: str, *, offsets: bool, bfloat16: bool) -> int:
    """Address of a function that writes weights, [count, width] of bfloat16 or float32, to ``out``."""
    unpacker = UNPACKERS[format_name]
    size = 2 if bfloat16 else 4

    def write_row(v: VectorBuilder, task: _Task, row: ir.Value, block_at: Callable[[ir.Value], Block]) -> None:
        def write_block(group: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            here = v.add(v.mul(row, task["groups"]), group)
            target = v.at(task.address("out"), v.mul(here, ir.Constant(I64, unpacker.elements * size)))
            v.prefetch(target, unpacker.elements * size, ahead=_WRITE_AHEAD, write=True)
            for part, finished in enumerate(unpacker.unpack(v, block_at(group), finish)):
                v.write(finished, target, part * LANES * size)
            return []

        def finish(weights: ir.Value) -> ir.Value:
            return v.to_bfloat16(weights, tiny=unpacker.tiny) if bfloat16 else weights

        v.repeat(ir.Constant(I64, 0), task["groups"], write_block)

    return _compiled(f"dequantize_{format_name}", format_name, offsets, write_row)


@cache
def multiplier(format_name: str, *, offsets: bool) -> int:
    """Address of a function that writes x·Wᵀ, [tokens, count] of float32, to ``out``."""
    unpacker = UNPACKERS[format_name]

    def write_row(v: VectorBuilder, task: _Task, row: ir.Value, block_at: Callable[[ir.Value], Block]) -> None:
        def one_token(token: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            def add_block(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                here = v.add(v.mul(token, task["groups"]), group)
                source = v.at(task.address("x"), v.mul(here, ir.Constant(I64, unpacker.elements * 4)))
                for part, weights in enumerate(unpacker.unpack(v, block_at(group), lambda weights: weights)):
                    inputs = v.read(vector(F32), source, part * LANES * 4)
                    sums[part % _SUMS] = v.fadd(sums[part % _SUMS], v.fmul(weights, inputs))
                return sums

            sums = v.repeat(ir.Constant(I64, 0), task["groups"], add_block, [constant(F32, 0.0)] * _SUMS)
            place = v.mul(v.add(v.mul(token, task["count"]), row), ir.Constant(I64, 4))
            v.write(v.total(sums), v.at(task.address("out"), place))
            return []

        v.repeat(ir.Constant(I64, 0), task["tokens"], one_token)

    return _compiled(f"linear_{format_name}", format_name, offsets, write_row)


def _compiled(
    name: str,
    format_name: str,
    offsets: bool,
    write_row: Callable[[VectorBuilder, _Task, ir.Value, Callable[[ir.Value], Block]], None],
) -> int:
    """A function that takes rows and calls for their code, in machine code."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
    v = VectorBuilder(function.append_basic_block("entry"))
    task = _Task(v, function.args[0])

    def one_row(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        in_file = v.read(I64, v.at(task.address("rows"), v.mul(row, ir.Constant(I64, 8))))
        source = v.mul(in_file, task["groups"])

        def block_at(group: ir.Value) -> Block:
            number = v.add(source, group)
            at = v.at(task.address("blocks"), v.mul(number, ir.Constant(I64, UNPACKERS[format_name].nbytes)))
            v.prefetch(at, UNPACKERS[format_name].nbytes, ahead=_READ_AHEAD, write=False)
            offset = None
            if offsets:
                place = v.mul(v.add(v.mul(row, task["groups"]), group), ir.Constant(I64, 2))
                offset = v.at(task.address("offsets"), place)
            return Block(at, number, offset, task.address("constants"))

        write_row(v, task, row, block_at)
        return []

    take, work, done = (function.append_basic_block(step) for step in ("take", "work", "done"))
    v.branch(take)
    v.position_at_end(take)
    first = v.atomic_rmw("add", task.pointer, task["chunk"], "monotonic")
    v.cbranch(v.icmp_signed("<", first, task["count"]), work, done)
    v.position_at_end(work)
    last = v.add(first, task["chunk"])
    v.repeat(first, v.select(v.icmp_signed("<", last, task["count"]), last, task["count"]), one_row)
    v.branch(take)
    v.position_at_end(done)
    v.ret_void()
    return machine_code(str(module), name)


@cache
def _machine() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = ",".join(f"{'+' if there else '-'}{name}" for name, there in host_features().items())
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


def machine_code(text: str, name: str) -> int:
    """Compile a module in LLVM's assembly for this processor; returns the address of one of its functions."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(text), _machine())
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(name)
