"""Keeping the memory of one step for the next.

A step allocates the same buffers as the one before. The allocator of GNU's C library gives a large block back to the
system when it is freed, and the system hands out memory page by page, cleared, as it is touched: tens of thousands of
page faults in each step. Two of its settings change that. Blocks up to 32 MB, the most that all its versions take for
this, come from its heap, and the heap keeps what it has. Larger blocks are few, and go back at once as before, so that
the peak is no higher.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of malloc.h
_LARGEST = 32 * 2**20
_NEVER = 2**31 - 1
# Settings of this kind that are there already were made by somebody who had a reason.
_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep what it frees; without effect where the allocator is another."""
    if not any(name in os.environ for name in _BY_USER) and _is_gnu():
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def _is_gnu() -> bool:
    """Whether this is GNU's C library; others have no such name to ask for."""
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and bool(os.confstr("CS_GNU_LIBC_VERSION"))
