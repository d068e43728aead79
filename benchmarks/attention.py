"""Attention on one document: folded batched products against torch's fused kernel, forward and backward.

    python benchmarks/attention.py

One layer of SmolLM2-135M (9 query heads, 3 key heads of 64) in bf16. Prints milliseconds, the median of 15 rounds in
which the two take turns.
"""

from __future__ import annotations

import statistics
import time

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from lorafit.models.attention import _attend_folded, _attend_fused

LENGTHS = (90, 150, 230, 400, 800, 1600)


def main() -> None:
    """Measure and print."""
    print("tokens  folded   fused")
    for length in LENGTHS:
        parts = [torch.randn(heads, length, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3)]
        times: dict[str, list[float]] = {"folded": [], "fused": []}
        for _ in range(16):
            for name, attend in (("folded", _attend_folded), ("fused", _attend_fused)):
                started = time.perf_counter()
                result = attend(*parts, 0.125)
                result.backward(torch.ones_like(result))
                times[name].append(1e3 * (time.perf_counter() - started))
        # The first round is warm-up.
        folded, fused = (statistics.median(measured[1:]) for measured in times.values())
        print(f"{length:6}  {folded:6.2f}  {fused:6.2f}", flush=True)


if __name__ == "__main__":
    main()
