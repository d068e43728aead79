"""Rewritten GGUF files, against gguf-py and byte by byte."""

import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_writer import rewrite
from lorafit.errors import FormatError
from lorafit.formats import dequantize
from tests.oracles import raw_gguf as raw
from tests.oracles.raw_gguf import RawTensor, gguf_bytes
from tests.oracles.tiny_gguf import write_tiny_llama


@dataclass
class Constant:
    """All bytes of a tensor become the same."""

    format: str
    row_bytes: int
    byte: int = 7

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        return torch.full((len(blocks), self.row_bytes), self.byte, dtype=torch.uint8)


@dataclass
class ToFloat:
    """A tensor becomes F32 with the number of its row added."""

    source: str
    width: int
    format: str = "F32"

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        weights = dequantize(blocks, self.source, (len(blocks), self.width))
        return (weights + torch.arange(start, start + len(blocks)).unsqueeze(1)).view(torch.uint8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf").path


def test_without_replacements_every_byte_is_the_same(model: Path, tmp_path: Path) -> None:
    rewrite(GGUFFile.open(model), tmp_path / "new.gguf", {})
    assert (tmp_path / "new.gguf").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    "names", [["blk.0.attn_q.weight"], ["token_embd.weight", "blk.1.ffn_down.weight"], ["output_norm.weight"]]
)
def test_gguf_py_reads_what_was_replaced_and_all_the_rest(model: Path, tmp_path: Path, names: list[str]) -> None:
    source, target = GGUFFile.open(model), tmp_path / "new.gguf"
    infos = [source.tensors[name] for name in names]
    rewrite(source, target, {info.name: ToFloat(info.format, info.shape[-1]) for info in infos})
    before, after = (gguf.GGUFReader(path) for path in (model, target))
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert list(old.shape) == list(new.shape)
        if old.name not in names:
            assert old.tensor_type == new.tensor_type
            np.testing.assert_array_equal(old.data, new.data)
            continue
        assert new.tensor_type == gguf.GGMLQuantizationType.F32
        weights = gguf.quants.dequantize(old.data, old.tensor_type)
        weights = weights + (np.arange(len(weights))[:, None] if weights.ndim == 2 else 0)
        np.testing.assert_array_equal(weights.astype(np.float32), new.data)
    assert before.fields.keys() == after.fields.keys()
    for name, field in before.fields.items():
        assert field.contents() == after.fields[name].contents()
    # As bytes too: all up to the tensor table.
    assert target.read_bytes()[: source.table_at] == model.read_bytes()[: source.table_at]


def test_a_tensor_of_many_pieces(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((3000, 416)).astype(np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    (tmp_path / "old.gguf").write_bytes(gguf_bytes([], [RawTensor("large", (416, 3000), 8, blocks.tobytes())]))
    source = GGUFFile.open(tmp_path / "old.gguf")
    rewrite(source, tmp_path / "new.gguf", {"large": ToFloat("Q8_0", 416)})
    found = GGUFFile.open(tmp_path / "new.gguf").blocks("large").view(torch.float32).numpy()
    expected = (
        gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0) + np.arange(3000, dtype=np.float32)[:, None]
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("alignment", [8, 32, 4096])
@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_layout_is_kept_to_the_byte(tmp_path: Path, alignment: int, which: str) -> None:
    """Odd lengths, and bytes after the last tensor."""
    entries = [("general.alignment", raw.U32, alignment), ("some.text", raw.STRING, "näh"), ("f", raw.F32, 0.1)]
    rows = {"a": 1, "b": 3, "c": 2}

    def content(tensors: dict[str, RawTensor]) -> bytes:
        data = gguf_bytes(entries, list(tensors.values()), alignment=alignment)
        return data + bytes(-len(data) % alignment) + b"tail"

    tensors = {name: RawTensor(name, (32, n), 3, bytes([n]) * (20 * n)) for name, n in rows.items()}
    (tmp_path / "old.gguf").write_bytes(content(tensors))
    source = GGUFFile.open(tmp_path / "old.gguf")
    for name, kind, row_bytes in (("Q4_1", 3, 20), ("Q8_0", 8, 34)):
        rewrite(source, tmp_path / "new.gguf", {which: Constant(name, row_bytes)})
        changed = RawTensor(which, (32, rows[which]), kind, b"\7" * (rows[which] * row_bytes))
        assert (tmp_path / "new.gguf").read_bytes() == content({**tensors, which: changed})


def test_rows_that_are_no_whole_blocks_of_the_new_format(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(gguf_bytes([], [RawTensor("x", (48, 2), 0, struct.pack("<96f", *range(96)))]))
    with pytest.raises(FormatError, match="a row of 48 weights is not a whole number of Q4_1 blocks"):
        rewrite(GGUFFile.open(tmp_path / "old.gguf"), tmp_path / "new.gguf", {"x": Constant("Q4_1", 20)})
    assert not (tmp_path / "new.gguf").exists()
