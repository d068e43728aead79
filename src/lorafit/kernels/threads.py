"""Running compiled code in all of torch's threads.

Torch computes in the threads of OpenMP, and those wait for work by spinning. Threads of our own would have to share
the cores with threads that spin; so the same ones are borrowed, by calling what a compiler emits for "do this in
parallel" (``GOMP_parallel``), in the OpenMP library that torch has loaded. A library without that name leaves Python's
threads, which take some 50 microseconds to start.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

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
