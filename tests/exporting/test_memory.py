"""Memory while a model is exported: a few times its largest tensor, however many there are."""

import sys
from pathlib import Path

import pytest

from lorafit.commands.export import export
from tests.oracles.memory import memory_of
from tests.oracles.tiny_gguf import write_tiny_llama

LARGEST = 4 * 512 * 2048  # bytes of the largest tensor as float32
# Names, modules and pages of a file: measured 0.2 MB for each layer on top of the tensors, and there are four.
MARGIN = 2_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
def test_a_model_is_unpacked_tensor_by_tensor(tmp_path: Path) -> None:
    small, large = str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")
    write_tiny_llama(Path(small))
    write_tiny_llama(Path(large), hidden=512, intermediate=2048, layers=4)
    export = "export({!r}, {!r})"
    grown = memory_of(
        export.format(large, str(tmp_path / "out")),
        before=f"from lorafit.commands.export import export\n{export.format(small, str(tmp_path / 'first'))}",
        spare=False,
    )
    total = (tmp_path / "out" / "model.safetensors").stat().st_size
    # Unpacked, as it was written, and rounded to compare it: measured 10.5 MB.
    limit = 3 * LARGEST + MARGIN
    assert limit < 0.25 * total, "a copy of the whole would be seen"
    assert grown <= limit


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak counts what is cached")
def test_a_gguf_file_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """From a directory, and that file from itself: not even what is mapped is in memory as a whole."""
    for name, sizes in (("small", {}), ("large", {"hidden": 512, "intermediate": 2048, "layers": 4})):
        write_tiny_llama(tmp_path / f"{name}.gguf", **sizes)
        export(str(tmp_path / f"{name}.gguf"), str(tmp_path / name))

    def both(name: str) -> str:
        paths = [str(tmp_path / path) for path in (name, f"{name}-f32.gguf", f"{name}-q8.gguf")]
        return (
            f"export({paths[0]!r}, {paths[1]!r}, format='gguf')\n"
            f"export({paths[1]!r}, {paths[2]!r}, format='gguf', dtype='q8_0')"
        )

    grown = memory_of(
        both("large"),
        before="from lorafit.commands.export import export\n"
        "from lorafit.exporting import gguf_certificate\n"
        "gguf_certificate.available = lambda: False  # llama.cpp has its own memory\n" + both("small"),
        spare=False,
    )
    total = (tmp_path / "large-f32.gguf").stat().st_size
    # Compared, it is there as it lies in both files and as it is unpacked from both: measured 17.5 MB.
    limit = 4 * LARGEST + MARGIN
    assert limit < 0.3 * total, "a copy of the whole would be seen, and even a mapped one"
    assert grown <= limit
