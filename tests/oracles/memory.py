"""How much memory a few lines of Python take at their peak, measured from outside of them."""

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


def memory_of(measured: str, *, before: str) -> int:
    """Growth of the resident memory of a new process at its peak, in bytes, the files that it maps counted. Linux only.

    Args:
        measured: What is measured.
        before: What is done before, for code and memory that are needed once.
    """
    script = _MEASURING.format(before=before, measured=measured)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
