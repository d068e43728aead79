"""Memory while a run is merged into a directory: a few times the largest tensor, and never a model as a whole."""

import sys
from pathlib import Path

import pytest

from lorafit.config import LoRA
from tests.merging.runs import write_run
from tests.oracles.memory import memory_of
from tests.oracles.tiny_directory import write_tiny_directory

# Merging alone was measured to take 5.0 times the largest tensor and 2 MB, with the tensor's pages in the file that is
# read and the one that was written; what a forward pass on the held-out rows keeps brings it to 10 MB.
MARGIN = 15_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
def test_a_run_is_merged_tensor_by_tensor(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "small")
    write_tiny_directory(tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    merges = []
    for size in ("small", "large"):
        run = write_run(tmp_path / f"run-{size}", tmp_path / size, LoRA(rank=2), size=0.01)
        merges.append(f"merge({str(run)!r}, {str(tmp_path / f'out-{size}')!r})")
    grown = memory_of(merges[1], before=f"from lorafit.commands.merge import merge\n{merges[0]}", spare=False)
    total = (tmp_path / "out-large" / "model.safetensors").stat().st_size
    limit = 5 * 4 * 512 * 2048 + MARGIN
    assert limit < 0.3 * total, "a copy of the whole would be seen, and so would its pages"
    assert grown <= limit
