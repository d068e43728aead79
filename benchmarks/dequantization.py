"""Unpacking a million weights to bfloat16: compiled code, the torch reference and bitsandbytes, format by format.

    python benchmarks/dequantization.py [--rounds 7] [--json FILE] [--step MODEL]

Every round measures all of them one after the other (A B C A B C) on the same seven matrices, those of one layer of a
model of 1,024 dimensions, and medians are printed, so that the ratios hold on a machine whose speed drifts. lorafit and
its reference write into one buffer, as in training; bitsandbytes unpacks matrices of the same shapes, which it
quantised, into memory that it asks for, because on a processor it takes no other.

With ``--step`` it also measures how much of training steps of 800 tokens on a model goes into unpacking, for LoRA and
QA-LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from torch import Tensor

from lorafit import kernels
from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.formats import FORMATS
from lorafit.kernels import reference
from lorafit.models.load import load
from lorafit.training.speed import make_trainer

SHAPES = [(1024, 1024), (256, 1024), (256, 1024), (1024, 1024), (2816, 1024), (2816, 1024), (1024, 2816)]
MILLIONS = sum(rows * width for rows, width in SHAPES) / 1e6
# 2^-4 as each type of scale has it, so that no weight is so small or large that a processor stumbles.
SCALES = {"<u2": b"\x00\x2c", "<u4": b"\x00\x00\x80\x3d", "u1": b"\x7c"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", metavar="MODEL")
    options = parser.parse_args()
    measured = measure(work_of_formats(), options.rounds)
    print(f"{torch.get_num_threads()} threads; µs for a million weights to bfloat16\n")
    print("| format | lorafit | reference | times faster | bitsandbytes | times faster |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in FORMATS:
        ours, slow, theirs = (measured.get((who, name)) for who in ("lorafit", "reference", "bitsandbytes"))
        assert ours is not None and slow is not None
        beside = f"{theirs:.0f} | {theirs / ours:.1f}" if theirs else " | "
        print(f"| {name} | {ours:.0f} | {slow:.0f} | {slow / ours:.0f} | {beside} |")
    shares = step_shares(options.step, options.rounds) if options.step else {}
    for method, share in shares.items():
        print(f"\nunpacking in a training step of 800 tokens, {method}: {share:.1%}", end="")
    print()
    if options.json:
        figures = {who: {name: time for (by, name), time in measured.items() if by == who} for who, _ in measured}
        options.json.write_text(json.dumps({"microseconds": figures, "share_of_step": shares}, indent=2) + "\n")


def work_of_formats() -> dict[tuple[str, str], Callable[[], None]]:
    """What is measured: (who, format) -> unpacking all the matrices."""
    out = torch.zeros(max(rows * width for rows, width in SHAPES), dtype=torch.bfloat16)
    work: dict[tuple[str, str], Callable[[], None]] = {}
    for name in FORMATS:
        matrices = [random_matrix(name, rows, width) for rows, width in SHAPES]
        work["lorafit", name] = lambda name=name, matrices=matrices: by_lorafit(name, matrices, out)  # type: ignore[misc]
        work["reference", name] = lambda name=name, matrices=matrices: by_reference(name, matrices, out)  # type: ignore[misc]
        if name.startswith(("NF4", "FP4")):
            work["bitsandbytes", name] = by_bitsandbytes(name)
    return work


def by_lorafit(name: str, matrices: list[tuple[Tensor, Tensor | None]], out: Tensor) -> None:
    """Every matrix by the backend that lorafit chooses."""
    for (blocks, constants), shape in zip(matrices, SHAPES, strict=True):
        kernels.dequantize(blocks, name, out.dtype, constants=constants, out=part(out, shape))


def by_reference(name: str, matrices: list[tuple[Tensor, Tensor | None]], out: Tensor) -> None:
    """Every matrix by plain torch."""
    for (blocks, constants), shape in zip(matrices, SHAPES, strict=True):
        reference.dequantize(blocks, name, None, None, constants, part(out, shape))


def by_bitsandbytes(name: str) -> Callable[[], None]:
    """Matrices of the same shapes that bitsandbytes quantised, and how it unpacks them."""
    from bitsandbytes import functional

    kind, double = name[:3].lower(), name.endswith("_DQ")
    packed = [
        functional.quantize_4bit(torch.randn(shape).bfloat16(), quant_type=kind, compress_statistics=double)
        for shape in SHAPES
    ]

    def unpack() -> None:
        for weights, state in packed:
            functional.dequantize_4bit(weights, state)

    return unpack


def part(out: Tensor, shape: tuple[int, int]) -> Tensor:
    """The beginning of a buffer as a matrix."""
    return out[: shape[0] * shape[1]].view(shape)


def random_matrix(name: str, rows: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Blocks of random integers, and constants."""
    block = FORMATS[name]
    blocks = torch.randint(256, (rows, width // block.elements, block.nbytes), dtype=torch.uint8)
    scale = torch.tensor(list(SCALES[block.float_type.bits]), dtype=torch.uint8)
    for at in block.floats:
        blocks[..., at : at + len(scale)] = scale
    count = block.constants(rows * width // block.elements)
    return blocks.view(rows, -1), torch.rand(count) if count else None


def measure(work: dict[tuple[str, str], Callable[[], None]], rounds: int) -> dict[tuple[str, str], float]:
    """Median microseconds for a million weights, after one round that compiles."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for _ in range(rounds + 1):
        for key, unpack in work.items():
            started = time.perf_counter()
            unpack()
            times[key].append((time.perf_counter() - started) * 1e6 / MILLIONS)
    return {key: statistics.median(measured[1:]) for key, measured in times.items()}


def step_shares(model: str, rounds: int) -> dict[str, float]:
    """The part of a training step that goes into ``kernels.dequantize``, by method."""
    trained = [place >= 60 for place in range(100)]
    random = torch.Generator().manual_seed(0)
    dequantize, spent = kernels.dequantize, [0.0]

    def timed(*args: object, **options: object) -> Tensor:
        started = time.perf_counter()
        result = dequantize(*args, **options)  # type: ignore[arg-type]
        spent[0] += time.perf_counter() - started
        return result

    trainers = {method: make_trainer(load(model)[0], method) for method in ("lora", "qalora")}
    shares: dict[str, list[float]] = {method: [] for method in trainers}
    kernels.dequantize = timed
    try:
        for _ in range(rounds + 1):
            for method, this in trainers.items():
                ids = torch.randint(1000, (8, 100), generator=random).tolist()
                spent[0] = 0.0
                step = this.step(split_passes([Document(row, trained, f"row {i}") for i, row in enumerate(ids)], 800))
                shares[method].append(spent[0] / step.seconds)
    finally:
        kernels.dequantize = dequantize
    return {method: statistics.median(measured[1:]) for method, measured in shares.items()}


if __name__ == "__main__":
    main()
