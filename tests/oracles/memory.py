"""How much memory a few lines of Python take at their peak, measured from outside of them."""

import os
import subprocess
import sys

_MEASURING = """
def peak():  # of this process alone; what getrusage says includes the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

{before}
_before = peak()
{measured}
print(peak() - _before)
"""


# glibc's allocator raises its thresholds by itself, and then keeps some tens of megabytes of what was freed; and work
# that is spread over threads takes pieces in each of them. Neither grows with a model.
_NOTHING_SPARE = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def memory_of(measured: str, *, before: str, spare: bool = True) -> int:
    """Growth of the resident memory of a new process at its peak, in bytes, the files that it maps counted. Linux only.

    Args:
        measured: What is measured.
        before: What is done before, for code and memory that are needed once.
        spare: Count also what the allocator keeps of what was freed, and what each thread works on. Without these the
            figure follows from the sizes of tensors, and is the same within a megabyte each time.
    """
    script = _MEASURING.format(before=before, measured=measured)
    environment = os.environ | ({} if spare else _NOTHING_SPARE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
