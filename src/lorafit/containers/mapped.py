"""Mapping files into memory, and giving pages back.

Pages of a mapped file come into memory when they are first read, and stay there until the system needs the space.
Whoever knows that a tensor will not be read again for long can say so, and the process is smaller by it at once.
"""

from __future__ import annotations

import mmap
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address


def map_file(file: BinaryIO) -> mmap.mmap:
    """Map a whole file. torch wants buffers that can be written to; what is written stays in memory."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _mappings[torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()] = mapped
    return mapped


def release(tensor: Tensor) -> None:
    """Let go of the pages under a tensor that lies in a mapped file; they come back from there when they are read.

    Nothing happens to other tensors, to pages that are shared with a neighbour, or where the system has no such call.
    What was written into the pages in memory is lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for start, mapped in list(_mappings.items()):
        first = tensor.data_ptr() - start
        if 0 <= first < len(mapped):
            begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
