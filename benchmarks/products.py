"""How fast matrix products of a model's shapes are, by their rows: as the library takes them, and in pieces.

    python benchmarks/products.py [--rows 256 512 784 1024 1280 2048]

GFLOP/s in bfloat16 of products with SmolLM2-135M's weights, forward and backward; eight weights in turn, so that none
stays in the nearest cache. Where there are two figures, the second is that of ``modules.matmul``, which cuts such a
product. Set ``OMP_NUM_THREADS`` for other numbers of threads, and ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` to see a
processor without matrix units.
"""

from __future__ import annotations

import argparse
from itertools import cycle

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from lorafit.modules.matmul import multiply, rows_at_once
from lorafit.training.speed import median_seconds

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576)]  # inputs and outputs of stacked layers
_FLOP = 2e10  # of one measurement


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 784, 1024, 1280, 2048])
    rows_of = parser.parse_args().rows
    print(f"{torch.get_num_threads()} threads, GFLOP/s by rows\n{'':>23}", *(f"{rows:>12}" for rows in rows_of))
    for direction in ("forward", "backward"):
        for shape in SHAPES:
            found = [rates(rows, *shape, forward=direction == "forward") for rows in rows_of]
            figures = (f"{' / '.join(f'{rate:.0f}' for rate in each):>12}" for each in found)
            print(f"{direction:>8} {f'{shape[0]} to {shape[1]}':>14}", *figures)


def rates(rows: int, inputs: int, outputs: int, *, forward: bool) -> list[float]:
    """Of X Wᵀ or dY W, as a whole, and of the same in pieces if it is cut."""
    inner, columns = (inputs, outputs) if forward else (outputs, inputs)
    left, out = (torch.randn(rows, width).bfloat16() for width in (inner, columns))
    stored = [torch.randn(outputs, inputs).bfloat16() for _ in range(8)]
    weights = cycle([weight.T if forward else weight for weight in stored])
    flop = 2 * rows * inner * columns
    times = range(max(4, int(_FLOP / flop)))
    ways = [torch.mm] if rows_at_once(rows, inner, columns) >= rows else [torch.mm, multiply]
    return [
        len(times) * flop / median_seconds(lambda: [way(left, next(weights), out=out) for _ in times], 6) / 1e9  # noqa: B023
        for way in ways
    ]


if __name__ == "__main__":
    main()
