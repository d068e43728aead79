"""Memory while a base is quantised: the quantised model, and at most three times the largest tensor.

Measured in a process of its own as the growth of its resident memory at its peak, the mapped files counted. The margin
is for what an allocator keeps; a small model is loaded first, for the code that is loaded at first use.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.tiny_directory import write_tiny_directory

MARGIN = 12_000_000
SCRIPT = """
import sys
from lorafit.models.load import load_base
from lorafit.modules.size import measure_size

def peak():  # of this process alone; what getrusage says includes the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

small, large, how = sys.argv[1:]
load_base(small, quantize=how, compute="bf16")
before = peak()
base = load_base(large, quantize=how, compute="bf16")
print(peak() - before, measure_size(base.model).nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
@pytest.mark.parametrize("how", ["nf4", "q4_1"])
def test_a_base_is_quantised_tensor_by_tensor(tmp_path: Path, how: str) -> None:
    write_tiny_directory(tmp_path / "small")
    write_tiny_directory(tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    total = (tmp_path / "large" / "model.safetensors").stat().st_size
    largest = 4 * 512 * 2048
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large"), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, quantized = map(int, done.stdout.split())
    assert quantized < total / 3
    assert quantized + 3 * largest + MARGIN < total, "loading all of it would be seen"
    assert grown <= quantized + 3 * largest + MARGIN
