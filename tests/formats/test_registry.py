"""The list of formats against gguf-py's."""

import gguf
import pytest

from lorafit.errors import FormatError
from lorafit.formats import FORMATS, block_format, format_by_id

OWN = {"NF4", "NF4_DQ", "FP4", "FP4_DQ"}  # bitsandbytes' formats, which GGUF files do not have
READ = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
}  # fmt: skip


def test_these_formats_are_there() -> None:
    assert set(FORMATS) == READ | OWN


@pytest.mark.parametrize("name", sorted(READ))
def test_number_and_size_agree_with_gguf_py(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block = block_format(name)
    assert (block.name, block.type_id) == (name, kind.value)
    assert (block.elements, block.nbytes) == gguf.GGML_QUANT_SIZES[kind]
    assert format_by_id(kind.value) is block


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGMLQuantizationType if kind.name not in READ])
def test_formats_that_are_not_read_are_named(kind: gguf.GGMLQuantizationType) -> None:
    with pytest.raises(FormatError, match=rf"has {kind.name} \(type {kind.value}\); lorafit reads F32, .*MXFP4$"):
        format_by_id(kind.value)


def test_formats_that_nobody_knows_are_refused() -> None:
    with pytest.raises(FormatError, match="type 12345, which is not a known format"):
        format_by_id(12345)
    with pytest.raises(FormatError, match="Q3_X is not a format that lorafit reads"):
        block_format("Q3_X")


@pytest.mark.parametrize("name", sorted(OWN))
def test_formats_of_no_gguf_file_have_no_number(name: str) -> None:
    assert FORMATS[name].type_id is None


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_are_whole_blocks(name: str) -> None:
    block = FORMATS[name]
    assert block.row_bytes(3 * block.elements) == 3 * block.nbytes
    if block.elements > 1:
        with pytest.raises(FormatError, match=rf"row of {block.elements + 1} weights is not a whole number of {name} "):
            block.row_bytes(block.elements + 1)
