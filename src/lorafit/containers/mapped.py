"""Mapping files into memory, and giving pages back.

Pages of a mapped file come into memory when they are first read, and stay there until the system needs the space.
Whoever knows that a tensor will not be read again for long can say so, and the process is smaller by it at once.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path
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


def mapped_files() -> list[range]:
    """Addresses where files are mapped now, by whoever; nothing where the system does not tell, as only Linux does."""
    told = Path("/proc/self/maps")
    found = []
    for line in told.read_text().splitlines() if told.exists() else ():
        addresses, *_, path = line.split(maxsplit=5)
        # Memory can have the name of a device, or of a file that is nowhere.
        if path.startswith("/") and Path(path).is_file():
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append(range(begin, end))
    return found


def release(tensor: Tensor, files: Sequence[range] = ()) -> None:
    """Let go of the pages under a tensor that lies in a mapped file; they come back from there when they are read.

    Nothing happens to other tensors, to pages that are shared with a neighbour, or where the system has no such call.
    What was written into the pages in memory is lost.

    Args:
        tensor: In a file that `map_file` mapped, or in one of ``files``.
        files: What `mapped_files` gave when the tensor was there already.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = tensor.data_ptr()
    begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin >= end:
        return
    for start, mapped in list(_mappings.items()):
        if start <= first < start + len(mapped):
            mapped.madvise(mmap.MADV_DONTNEED, begin - start, end - begin)
            return
    if any(begin in file and end <= file.stop for file in files):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
