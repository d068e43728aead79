"""Quantising with lorafit's search against ggml's own quantiser: squared error and time.

    python benchmarks/packing.py [--rows 512]

Weights are Gaussian and heavy-tailed (Laplace, Student's t with 4 degrees of freedom); SmolLM2's would not do, for they
lie on a grid that was quantised once. ggml is the one in the wheel ``xllamacpp``. Both work in one thread, in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
import xllamacpp
from torch import Tensor

from lorafit.formats import block_format, dequantize
from lorafit.kernels import search

FORMATS = ("Q4_1", "Q4_K", "Q5_1", "Q5_K", "Q6_K")
WIDTH = 4096


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help=f"of {WIDTH} weights")
    rows = parser.parse_args().rows
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = torch.Size((rows, WIDTH))
    samples = {
        "Gaussian": torch.randn(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student t, 4": torch.distributions.StudentT(4.0).sample(shape),
    }
    print(f"| squared error, ggml's is 1 | {' | '.join(samples)} | µs for 1,000 weights | ggml's |")
    print("| --- |" + " --- |" * (len(samples) + 2))
    for name in FORMATS:
        shares, seconds = [], [0.0, 0.0]
        for weights in samples.values():
            errors = []
            for i, pack in enumerate((_by_search, _by_ggml)):
                pack(weights[:8], name)  # compiled, and in the cache
                blocks, taken = _timed(pack, weights, name)
                seconds[i] += taken
                errors.append(float((dequantize(blocks, name, shape) - weights).double().square().sum()))
            shares.append(f"{errors[0] / errors[1]:.3f}")
        times = (f"{second / len(samples) / shape.numel() * 1e9:.0f}" for second in seconds)
        print(f"| {name} | {' | '.join((*shares, *times))} |", flush=True)


def _timed(pack: Callable[[Tensor, str], Tensor], weights: Tensor, name: str) -> tuple[Tensor, float]:
    begun = time.process_time()
    blocks = pack(weights, name)
    return blocks, time.process_time() - begun


def _by_search(weights: Tensor, name: str) -> Tensor:
    return search.quantize(weights, name).blocks


def _by_ggml(weights: Tensor, name: str) -> Tensor:
    block = block_format(name)
    blocks = torch.empty(len(weights), block.row_bytes(WIDTH), dtype=torch.uint8)
    function = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    # Type, source, destination, first element, rows, width, importance.
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    written = function(block.type_id, weights.data_ptr(), blocks.data_ptr(), 0, len(weights), WIDTH, None)
    assert written == blocks.nbytes
    return blocks


if __name__ == "__main__":
    main()
