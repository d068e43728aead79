"""Memory while a base is quantised: the quantised model, and at most three times the largest tensor; and while one in
full precision is made ready to train: the size of its file, read once.
"""

import sys
from pathlib import Path

import pytest

from lorafit.models.load import load_base
from lorafit.modules.size import measure_size
from tests.oracles.memory import memory_of
from tests.oracles.tiny_directory import write_tiny_directory

LARGEST = 4 * 512 * 2048  # bytes of the largest tensor as float32


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
@pytest.mark.parametrize("how", ["nf4", "q4_1"])
def test_a_base_is_quantised_tensor_by_tensor(tmp_path: Path, how: str) -> None:
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    write_tiny_directory(Path(small))
    write_tiny_directory(Path(large), hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    total = (tmp_path / "large" / "model.safetensors").stat().st_size
    load = f"base = load_base({{!r}}, quantize={how!r}, compute='bf16')"
    grown = memory_of(
        load.format(large), before=f"from lorafit.models.load import load_base\n{load.format(small)}", spare=False
    )
    quantized = measure_size(load_base(large, quantize=how, compute="bf16").model).nbytes  # type: ignore[arg-type]
    # 12.6 MB beside the quantised model: measured 5 to 7 for nf4, 11 for q4_1, of which the pieces that its search for
    # scales works on are most.
    limit = quantized + 3 * LARGEST
    assert limit < 0.3 * total, "loading all of it would be seen"
    assert quantized < grown <= limit


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages of files are not given back")
def test_weights_that_are_laid_together_are_in_memory_once(tmp_path: Path) -> None:
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    write_tiny_directory(Path(small))
    write_tiny_directory(Path(large), hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    total = (tmp_path / "large" / "model.safetensors").stat().st_size
    ready = "lay_weights_together(load_base({!r}, compute='fp32').model)"
    imports = "from lorafit.models.fuse import lay_weights_together\nfrom lorafit.models.load import load_base\n"
    grown = memory_of(ready.format(large), before=imports + ready.format(small), spare=False)
    # 70% of these weights are copied; two of the largest are there twice meanwhile, which is what was measured.
    assert 0.9 * total < grown < total + 3 * LARGEST
