"""What comes into memory with transformers."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

SCRIPT = """
import sys
import lorafit.training.run
assert "torch._dynamo" in sys.modules, "this test is about what imports that"
assert "triton" not in sys.modules
from torch.utils._triton import has_triton_package
assert has_triton_package()
import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="Triton is of use here")
def test_triton_is_left_out_and_is_there_for_others() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
