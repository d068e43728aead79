"""Packed layers compute what the dequantised matrix computes, forward and backward, however few or many the tokens."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lorafit.formats import FORMATS, dequantize
from lorafit.models.load import load_base
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight, packed
from tests.oracles.adapted import q4_1
from tests.oracles.blocks import random_blocks
from tests.oracles.tiny_gguf import write_tiny_llama

OUT, IN = 48, 96
TOKENS = torch.tensor([list(range(40, 80))])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(rows: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer and its matrix in float64, dequantised by gguf-py."""
    blocks = q4_1(OUT, IN)
    matrix = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)).double()
    packed = PackedWeight(torch.from_numpy(blocks), "Q4_1", rows=rows, name="test")
    return PackedLinear(packed, bias), matrix if rows is None else matrix[rows]


@pytest.mark.parametrize("tokens", [1, 3, 40])  # below and above where the fused kernel hands over
@pytest.mark.parametrize("permuted", [False, True])
def test_forward_is_a_product_with_the_dequantised_matrix(tokens: int, permuted: bool) -> None:
    rows = torch.randperm(OUT, generator=torch.Generator().manual_seed(1)) if permuted else None
    bias = torch.linspace(-1, 1, OUT)
    linear, matrix = layer(rows, bias)
    x = torch.randn(2, tokens, IN, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ matrix.T + bias.double()
    assert linear(x).shape == (2, tokens, OUT)
    # float32 sums of 96 products of size 0.1: an error of 1e-7 each.
    torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(linear(x.requires_grad_()).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("permuted", [False, True])
def test_backward_is_that_of_the_dequantised_matrix(permuted: bool) -> None:
    rows = torch.arange(OUT).flip(0) if permuted else None
    linear, matrix = layer(rows)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, OUT, dtype=torch.float64)
    linear(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ matrix, rtol=0, atol=1e-12)  # all in float64


@pytest.mark.parametrize("name", ["Q4_1", "NF4_DQ"])  # one with constants that belong to places in the whole matrix
@pytest.mark.parametrize("permuted", [False, True])
def test_a_large_matrix_is_multiplied_in_pieces(name: str, permuted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = 50, 128
    monkeypatch.setattr(packed, "PIECE", 7 * width)  # seven pieces and a rest
    blocks, constants = random_blocks(name, height, width // FORMATS[name].elements)
    rows = torch.randperm(height, generator=torch.Generator().manual_seed(1)) if permuted else torch.arange(height)
    matrix = dequantize(blocks, name, (height, width), constants).double()[rows]
    linear = PackedLinear(PackedWeight(blocks, name, rows=rows if permuted else None, constants=constants))
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(y, x.detach() @ matrix.T, rtol=1e-12, atol=1e-9)  # all in float64
    torch.testing.assert_close(x.grad, grad @ matrix, rtol=1e-12, atol=1e-9)


def test_embedding_takes_rows_of_the_dequantised_matrix() -> None:
    rows = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))
    linear, matrix = layer(rows)
    ids = torch.tensor([[3, 47, 0], [3, 3, 9]])
    for dtype in (torch.float32, torch.bfloat16):
        # Dequantisation is exact in float32, and rounds once to another type.
        assert torch.equal(PackedEmbedding(linear.packed, dtype)(ids), F.embedding(ids, matrix.float()).to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_layers_of_every_format(name: str) -> None:
    """The matrix is that of ``lorafit.formats``, which has oracles of its own, with its rows permuted."""
    block = FORMATS[name]
    blocks, constants = random_blocks(name, OUT, max(1, 64 // block.elements))
    width = blocks.shape[1] // block.nbytes * block.elements
    rows = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))
    matrix = dequantize(blocks, name, (OUT, width), constants).double()[rows]
    packed = PackedWeight(blocks, name, rows=rows, constants=constants)
    assert packed.shape == (OUT, width)
    assert packed.nbytes == blocks.numel() + (0 if constants is None else 4 * len(constants))
    assert not packed.state_dict()
    linear = PackedLinear(packed)
    for tokens in (2, 9):  # fused, and unpacked
        x = torch.randn(tokens, width, requires_grad=True)
        size = x.detach().double().abs() @ matrix.abs().T
        # A float32 sum of at most 256 products has an error below 257 · 2⁻²⁴ of the sum of their sizes.
        assert ((linear(x).double() - x.double() @ matrix.T).abs() <= size * 2e-5).all()
        with torch.no_grad():
            assert ((linear(x).double() - x.double() @ matrix.T).abs() <= size * 2e-5).all()
    grad = torch.randn(9, OUT)
    linear(x).backward(grad)
    assert ((x.grad.double() - grad.double() @ matrix).abs() <= grad.double().abs() @ matrix.abs() * 2e-5).all()
    ids = torch.tensor([[3, 47, 0], [3, 3, 9]])
    assert torch.equal(PackedEmbedding(packed, torch.float32)(ids), matrix.float()[ids])


def test_the_buffer_may_be_born_in_inference_mode() -> None:
    rows = 3000  # larger than any other test's, so that the buffer is allocated here
    linear = PackedLinear(PackedWeight(torch.from_numpy(q4_1(rows, 64)), "Q4_1"))
    with torch.inference_mode():
        linear(torch.ones(8, 64, dtype=torch.float64))
    x = torch.ones(8, 64, dtype=torch.float64, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block_format", ["Q4_1", "Q8_0", "F16", "F32"])
def test_a_model_equals_its_dequantised_twin(tmp_path: Path, block_format: str, tied: bool) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format=block_format, embedding_format=block_format, tied=tied)  # type: ignore[arg-type]
    model, dense = load_base(tiny.path, compute="fp32").model, tiny.dense()
    results = []
    for either in (model, dense):
        embedded = either.get_input_embeddings()(TOKENS).detach().requires_grad_()
        logits = either(inputs_embeds=embedded).logits
        (logits.float().log_softmax(-1)[0, :, 7]).sum().backward()
        results.append((logits.detach(), embedded.grad))
    # float32, sums in another order: logits of size 5, measured 1e-5; gradients of size 1.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # one token: the fused kernel
        torch.testing.assert_close(model(TOKENS[:, :1]).logits, dense(TOKENS[:, :1]).logits, rtol=0, atol=1e-4)


def test_weights_stay_packed_and_a_tied_one_is_held_once(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf")
    model = load_base(tiny.path, compute="fp32").model
    assert model.lm_head.packed is model.model.embed_tokens.packed
    norms = sum(int(np.prod(w.shape)) for name, w in tiny.weights.items() if "norm" in name)
    assert sum(parameter.numel() for parameter in model.parameters()) == norms
    packed = sum(m.blocks.numel() for m in model.modules() if isinstance(m, PackedWeight))
    matrices = {name: w.size for name, w in tiny.weights.items() if w.ndim == 2}
    embedding = matrices.pop("model.embed_tokens.weight")
    assert packed == sum(matrices.values()) // 32 * 20 + embedding // 32 * 34
