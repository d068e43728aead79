"""The textbook modules, against the formula written out and against the adapter that models get."""

import pytest
import torch
from torch import nn

from lorafit.config import LoRA
from lorafit.modules import LoRALinear
from lorafit.nn import LinearWithLoRA, LoRALayer, replace_linear_with_lora


def filled(layer: LoRALayer) -> LoRALayer:
    nn.init.normal_(layer.B)
    return layer


def test_update_is_the_formula():
    layer = filled(LoRALayer(5, 3, rank=2, alpha=0.7).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.einsum("ti,ir,ro->to", x, layer.A, layer.B) * 0.7
    # float64, sums of at most ten products: rounding is far below 1e-12.
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_update_starts_at_zero_and_a_within_kaiming_bounds():
    torch.manual_seed(0)
    layer = LoRALayer(400, 30, rank=8, alpha=3.0)
    assert torch.equal(layer(torch.randn(2, 400)), torch.zeros(2, 30))
    # Uniform within 1/sqrt(in_dim); of 3,200 draws the largest lies within a percent of the bound.
    assert 0.99 / 20 < layer.A.abs().max() <= 1 / 20


def test_agrees_with_the_adapter_of_models():
    linear = nn.Linear(6, 4)
    textbook = LinearWithLoRA(linear, rank=2, alpha=1.5)
    filled(textbook.lora)
    adapter = LoRALinear(linear, LoRA(rank=2, alpha=1.5, scaling="plain"))
    with torch.no_grad():
        adapter.lora_A.copy_(textbook.lora.A.T)
        adapter.lora_B.copy_(textbook.lora.B.T)
    x = torch.randn(3, 6)
    # float32, another order of summation over six and two terms.
    torch.testing.assert_close(adapter(x), textbook(x), atol=1e-6, rtol=1e-6)


def test_replaces_every_linear_layer_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    before = model(x)
    assert replace_linear_with_lora(model, rank=2, alpha=1.0) == ["0", "2.0"]
    assert torch.equal(model(x), before)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 2 * (4 + 8) + 2 * (8 + 2)
    with pytest.raises(ValueError, match="no linear layer"):
        replace_linear_with_lora(model, rank=2, alpha=1.0)
