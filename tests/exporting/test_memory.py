"""Memory while a model is exported: its file, which is mapped, and a few times the largest tensor."""

import sys
from pathlib import Path

import pytest

from tests.oracles.memory import memory_of
from tests.oracles.tiny_gguf import write_tiny_llama

MARGIN = 20_000_000  # for what an allocator keeps


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
def test_a_model_is_unpacked_tensor_by_tensor(tmp_path: Path) -> None:
    small, large = str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")
    write_tiny_llama(Path(small))
    write_tiny_llama(Path(large), hidden=512, intermediate=2048, layers=4)
    mapped = Path(large).stat().st_size
    export = "export({!r}, {!r})"
    grown = memory_of(
        export.format(large, str(tmp_path / "out")),
        before=f"from lorafit.commands.export import export\n{export.format(small, str(tmp_path / 'first'))}",
    )
    total = (tmp_path / "out" / "model.safetensors").stat().st_size
    # Unpacked, as it was written, and rounded to compare it.
    limit = mapped + 3 * 4 * 512 * 2048 + MARGIN
    assert limit < 0.7 * total, "a copy of the whole would be seen"
    assert grown <= limit
