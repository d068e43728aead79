"""Vector code for the processor, compiled by LLVM on the user's machine when a format is first met.

``vectors`` has the instructions, ``unpackers`` what turns a block of each format into weights, ``loops`` what is
compiled, and ``threads`` where it runs.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lorafit.kernels import vectors

if not vectors.is_served():
    raise ImportError("lorafit has no vector code for this processor")

from lorafit.kernels import loops, threads
from lorafit.kernels.unpackers import UNPACKERS

# Weights that one thread unpacks sooner than a second one starts; and pieces of work for each thread.
_WORTH_A_THREAD = 2**14
_CHUNKS = 4
_TASK = ctypes.c_int64 * len(loops.FIELDS)


def supports(blocks: Tensor, format_name: str, dtype: torch.dtype) -> bool:
    """Whether this backend has the format, for rows of this length, and can write the type."""
    whole = format_name in UNPACKERS and blocks.shape[1] % UNPACKERS[format_name].nbytes == 0
    return whole and dtype in (torch.bfloat16, torch.float32)


def dequantize(
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
    out: Tensor,
) -> None:
    """Write the weight into ``out`` [rows, width], bfloat16 or float32."""
    code = loops.dequantizer(format_name, offsets=offsets is not None, bfloat16=out.dtype == torch.bfloat16)
    _run(code, blocks, format_name, rows, offsets, constants, None, out)


def linear(
    x: Tensor,
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
) -> Tensor:
    """x·Wᵀ: [tokens, width] -> [tokens, rows] in the type of ``x``."""
    code = loops.multiplier(format_name, offsets=offsets is not None)
    count = blocks.shape[0] if rows is None else len(rows)
    out = torch.zeros(x.shape[0], count, dtype=torch.float32, device=blocks.device)
    _run(code, blocks, format_name, rows, offsets, constants, x, out)
    return out.to(x.dtype)


def _run(
    code: int,
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
    x: Tensor | None,
    out: Tensor,
) -> None:
    unpacker = UNPACKERS[format_name]
    groups = blocks.shape[1] // unpacker.nbytes
    count, tokens = (out.shape[0], 1) if x is None else (out.shape[1], out.shape[0])
    work = count * groups * unpacker.elements * tokens
    if work == 0:
        return
    workers = min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD)
    chunk = -(-count // (workers * _CHUNKS))
    order = _natural_order(count) if rows is None else rows.to(torch.int64)
    x = None if x is None else x.float()
    tensors = [t if t is None else t.contiguous() for t in (blocks, order, offsets, constants, x)]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    task = _TASK(0, count, chunk, groups, *addresses, tokens, out.data_ptr())
    threads.run(code, ctypes.addressof(task), workers)


@cache
def _natural_order(count: int) -> Tensor:
    return torch.arange(count, device="cpu")
