"""The GPU's kernels on a GPU: the bits are those of the processor's."""

import pytest
import torch

from lorafit import kernels
from lorafit.formats import FORMATS
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight
from tests.kernels.comparing import any_blocks, assert_same_bits, by_reference
from tests.oracles.blocks import random_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    groups = 5 if name not in ("F32", "F16", "BF16") else 160
    blocks, constants = any_blocks(name, 70, groups)
    on_gpu = None if constants is None else constants.cuda()
    for rows in (None, torch.randperm(70), torch.tensor([69, 0, 0, 3], dtype=torch.int32)):
        chosen = None if rows is None else rows.cuda()
        result = kernels.dequantize(blocks.cuda(), name, dtype, rows=chosen, constants=on_gpu)
        assert result.is_cuda
        assert_same_bits(result.cpu(), by_reference(blocks, name, dtype, rows, constants=constants))
        if FORMATS[name].offset_at is not None:
            offsets = torch.randn(len(result), groups).half()
            result = kernels.dequantize(blocks.cuda(), name, dtype, rows=chosen, offsets=offsets.cuda())
            assert_same_bits(result.cpu(), by_reference(blocks, name, dtype, rows, offsets))


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "NF4_DQ"])
def test_packed_layers_compute_there_what_they_compute_here(name: str) -> None:
    blocks, constants = random_blocks(name, 48, 512 // FORMATS[name].elements)
    rows = torch.randperm(48)
    packed = PackedWeight(blocks, name, rows=rows, constants=constants)
    weight = by_reference(blocks, name, torch.float64, rows, constants=constants)
    x = torch.randn(9, 512, dtype=torch.float64)
    expected = x @ weight.T
    there = PackedLinear(packed).cuda()
    inputs = x.cuda().requires_grad_()
    y = there(inputs)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-9, atol=1e-9)  # all in float64
    y.sum().backward()
    torch.testing.assert_close(inputs.grad.cpu(), weight.sum(0).expand(9, -1), rtol=1e-9, atol=1e-9)
    ids = torch.tensor([[3, 47], [0, 3]])
    found = PackedEmbedding(there.packed, torch.float32)(ids.cuda())
    assert torch.equal(found.cpu(), weight.float()[ids])
