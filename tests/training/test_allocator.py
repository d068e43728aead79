"""Memory that was freed is there, page by page, for the next step."""

import os
import subprocess
import sys

import pytest

from lorafit.training import allocator

# In a process of its own, because the setting lasts: blocks of 16 MB that are touched and freed, ten times.
FAULTS = """
import ctypes, resource
from lorafit.training.allocator import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def touch():
    for _ in range(10):
        block = library.malloc(16 * 2**20)
        ctypes.memset(block, 1, 16 * 2**20)
        library.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {kept}:
    keep_freed_memory()
touch()
before = faults()
touch()
print(faults() - before)
"""


def faults(*, kept: bool, **settings: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in allocator._BY_USER}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(kept=kept)],
        env=environment | settings, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not allocator._is_gnu(), reason="the allocator is not that of GNU's C library")
def test_freed_memory_is_kept_unless_the_user_has_set_it() -> None:
    # 16 MB are 4,096 pages, or 8 of the large ones that some systems hand out.
    assert faults(kept=True) < 5
    assert faults(kept=False, MALLOC_MMAP_THRESHOLD_="1000000") >= 80
    assert faults(kept=True, MALLOC_MMAP_THRESHOLD_="1000000") >= 80
