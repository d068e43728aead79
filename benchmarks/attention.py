"""Attention over packed documents: our batched products and softmax against torch's products and fused kernel.

    python benchmarks/attention.py

One layer of SmolLM2-135M (9 query heads, 3 key heads of 64) in bf16 on about 1,600 tokens, forward and backward. Prints
milliseconds, the median of 9 rounds in which the two take turns. ``packed`` rotates queries and keys as well, which for
``transformers`` has been done before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from torch import Tensor, nn

from lorafit.kernels.step import side_by_side
from lorafit.models.attention import attend_documents
from lorafit.modules.attention import Attention, attend

LENGTHS = (60, 90, 150, 230, 400, 800, 1600)
DIM = 64


def main() -> None:
    """Measure and print."""
    print("documents of  packed  transformers")
    for length in LENGTHS:
        lengths = (length,) * (1600 // length)
        parts = [
            torch.randn(sum(lengths), heads * DIM, dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3)
        ]
        angle = torch.rand(sum(lengths), DIM) * 6
        angles = angle.cos().bfloat16(), angle.sin().bfloat16()

        def packed(
            parts: list[Tensor] = parts, angles: tuple[Tensor, Tensor] = angles, lengths: tuple[int, ...] = lengths
        ) -> Tensor:
            return attend(*parts, Attention(angles, side_by_side(lengths), DIM, DIM**-0.5))

        def plain(parts: list[Tensor] = parts, lengths: tuple[int, ...] = lengths) -> Tensor:
            heads = [part.unflatten(1, (-1, DIM)).transpose(0, 1).unsqueeze(0) for part in parts]
            return attend_documents(nn.Identity(), *heads, None, scaling=DIM**-0.5, document_lengths=lengths)[0]

        times = in_turn(packed, plain)
        print(f"{length:12}  {times[0]:6.2f}  {times[1]:12.2f}", flush=True)


def in_turn(*ways: Callable[[], Tensor]) -> list[float]:
    """Median milliseconds of each, backward pass included."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(10):
        for way, measured in zip(ways, times, strict=True):
            started = time.perf_counter()
            result = way()
            result.backward(torch.ones_like(result))
            measured.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(measured[1:]) for measured in times]  # the first round is warm-up


if __name__ == "__main__":
    main()
