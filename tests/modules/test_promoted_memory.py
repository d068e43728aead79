"""What promotion leaves in memory, by what the system says is resident."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafit.config import QALoRA
from lorafit.containers.mapped import map_file
from lorafit.modules import PackedLinear, PackedWeight, QALoRALinear
from tests.containers.test_mapped import resident

ROWS, WIDTH = 16384, 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_tensor_in_the_file_leaves_memory(tmp_path: Path) -> None:
    size = ROWS * WIDTH // 32 * 18
    np.zeros(size, np.uint8).tofile(tmp_path / "blocks")
    with (tmp_path / "blocks").open("rb") as file:
        blocks = torch.frombuffer(map_file(file), dtype=torch.uint8).view(ROWS, -1)
    base = PackedLinear(PackedWeight(blocks, "Q4_0"))
    x = torch.ones(8, WIDTH)
    with torch.no_grad():
        base(x)  # so that code that is compiled or loaded first does not count
        assert int(blocks.sum()) == 0
        full = resident()
        module = QALoRALinear(base, QALoRA(rank=1))
        # Other mappings may come and go, but not by the megabytes that this tensor has.
        assert full - resident() > 0.7 * size
        without = resident()
        module(x)
        assert resident() - without < 0.3 * size
        module.enabled = False
        module(x)
        assert resident() - without < 0.3 * size
        assert int(blocks.sum()) == 0
        assert resident() - without > 0.7 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_gives_back_what_it_has_unpacked(tmp_path: Path) -> None:
    size = ROWS * WIDTH // 32 * 20
    np.zeros(size, np.uint8).tofile(tmp_path / "blocks")
    with (tmp_path / "blocks").open("rb") as file:
        blocks = torch.frombuffer(map_file(file), dtype=torch.uint8).view(ROWS, -1)
    base = PackedLinear(PackedWeight(blocks, "Q4_1"))
    adapted = QALoRALinear(base, QALoRA(rank=1))
    x = torch.ones(8, WIDTH, requires_grad=True)
    for module in (base, adapted):
        module(x).sum().backward()  # so that code that is compiled or loaded first does not count
        assert int(blocks.sum()) == 0
        full = resident()
        module(x).sum().backward()
        assert full - resident() > 0.7 * size
