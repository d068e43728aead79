"""Running compiled code in all of torch's threads.

Torch computes in the threads of OpenMP, and those wait for work by spinning. Threads of our own would have to share
the cores with threads that spin; so the same ones are borrowed, by calling what a compiler emits for "do this in
parallel" (``GOMP_parallel``), in the OpenMP library that torch has loaded. A library without that name leaves Python's
threads, which take some 50 microseconds to start.

Many small operations of torch one after the other, on pieces that fit into the cache, are better not shared: while
other processes had the cores, two threads took fifteen times as long as one. Such work is spread piece by piece.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(code: int, task: int, threads: int) -> None:
    """Run a function in some threads at once and wait for all of them.

    Args:
        code: Address of a function that takes an address.
        task: What it is called with, in each thread.
        threads: How many.
    """
    if threads == 1:
        _function(code)(task)
    elif parallel := _openmp():
        parallel(code, task, threads, 0)
    else:
        others = [_pool(threads - 1).submit(_function(code), task) for _ in range(threads - 1)]
        _function(code)(task)
        for other in others:
            other.result()


def spread(function: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """The function of each piece, some pieces at a time, each in one thread.

    Args:
        function: Computes with torch. It sets no number of threads and calls nothing that does.
        pieces: Its arguments, in the order of the results.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(pieces) == 1:
            return [function(piece) for piece in pieces]
        return list(_pool(threads).map(function, pieces))
    finally:
        torch.set_num_threads(threads)


@cache
def _function(code: int) -> Callable[[int], None]:
    return _FUNCTION(code)


@cache
def _openmp() -> Any:
    """The function that starts a parallel region, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel if torch.backends.openmp.is_available() else None
    except (AttributeError, OSError, TypeError):  # the last is how Windows answers
        return None
    if parallel is not None:
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
    return parallel


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
