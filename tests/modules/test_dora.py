"""DoRA's hand-written forward and backward pass against the formula of the paper under plain autograd, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoRA, QALoRA, TrainConfig
from lorafit.errors import ConfigError
from lorafit.modules import DoRALinear, PackedLinear, PackedWeight, attach
from lorafit.modules.dora import gains_held
from lorafit.training.setup import adapter_config
from tests.oracles.adapted import q4_1, q4_1_parts

OUT, IN, RANK = 48, 96, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed_base(bias: bool) -> tuple[PackedLinear, Tensor]:
    """A packed layer with permuted rows, and its weight."""
    blocks, rows = q4_1(OUT, IN), torch.arange(OUT).roll(5)
    scaled, offsets = q4_1_parts(blocks)
    weight = (scaled + offsets.repeat_interleave(32, 1))[rows]
    own = torch.linspace(-1, 1, OUT) if bias else None
    return PackedLinear(PackedWeight(torch.from_numpy(blocks), "Q4_1", rows=rows), own), weight


def ordinary_base(bias: bool) -> tuple[nn.Linear, Tensor]:
    layer = nn.Linear(IN, OUT, bias=bias)
    return layer, layer.weight.detach().double()


def trained(base: nn.Module, dropout: float = 0.0) -> DoRALinear:
    module = DoRALinear(base, LoRA(rank=RANK, alpha=6.0, dropout=dropout, dora=True))
    with torch.no_grad():
        module.lora_B.normal_(std=0.3)
        module.lora_magnitude_vector.mul_(torch.rand(OUT) + 0.5)
    return module


def formula(x: Tensor, z: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """Equations 5 and 11 of the paper; with dropout, z in place of x in all but the base's own product."""
    direction = weight + 6.0 / RANK * b @ a
    gain = m / direction.norm(dim=1).detach()
    y = x @ weight.T + gain * (z @ direction.T) - z @ weight.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("base_kind", [packed_base, ordinary_base])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_gradients_are_those_of_the_paper(base_kind: Any, bias: bool, dropout: float) -> None:
    base, weight = base_kind(bias)
    module = trained(base, dropout).train()
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    twins = [module.adapter_parameters()[name].detach().double().requires_grad_() for name in names]
    x = torch.randn(2, 7, IN, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    grad = torch.randn(2, 7, OUT)

    torch.manual_seed(3)
    y = module(x)
    y.backward(grad)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones(2, 7, IN), dropout).double() if dropout else 1.0
    expected = formula(twin, twin * kept, weight, base.bias, *twins)
    expected.backward(grad.double())
    pairs = [(y, expected), (x.grad, twin.grad)]
    pairs += [(module.adapter_parameters()[name].grad, other.grad) for name, other in zip(names, twins, strict=True)]
    for ours, theirs in pairs:
        # Sums of 96 products in float32, and packed weights in the float32 that they stand for: measured 2e-6.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-5)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(module(x), y, rtol=1e-5, atol=2e-5)
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("base_kind", [packed_base, ordinary_base])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_and_merges_into_what_it_computes(base_kind: Any, dtype: torch.dtype) -> None:
    base, weight = base_kind(True)
    if dtype == torch.bfloat16 and isinstance(base, nn.Linear):
        base, weight = base.to(dtype), base.weight.detach().to(dtype).double()
    elif isinstance(base, PackedLinear):
        base.bias = nn.Parameter(base.bias.to(dtype), requires_grad=False)
    x = torch.randn(5, IN).to(dtype)
    module = DoRALinear(base, LoRA(rank=RANK, dora=True)).eval()
    with torch.enable_grad():
        torch.testing.assert_close(module(x), base(x), rtol=0, atol=0 if dtype == torch.float32 else 0.02)
    module = trained(base).eval()
    merged = module.merged_weight(weight.float())
    # The bias is rounded with the rest in bf16, whose numbers of size 2 are 0.016 apart.
    expected = x.double() @ merged.double().T + base.bias.double()
    with torch.no_grad():
        atol = 1e-5 if dtype == torch.float32 else 0.06
        torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(module.delta_weight(), merged - weight.float(), rtol=0, atol=1e-5)
    module.enabled = False
    assert torch.equal(module(x), base(x))


def test_gains_are_kept_only_where_that_is_asked() -> None:
    module = trained(packed_base(False)[0]).eval()
    x = torch.randn(3, IN)
    with torch.no_grad():
        before = module(x)
        with gains_held(module):
            assert torch.equal(module(x), before)
            module.lora_magnitude_vector.mul_(2.0)
            assert torch.equal(module(x), before)
        after = module(x)
    torch.testing.assert_close(after, 2 * before)


def test_a_row_of_zeros_stays_one() -> None:
    base = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        base.weight[7] = 0.0
    module = DoRALinear(base, LoRA(rank=RANK, dora=True))
    y = module(torch.randn(3, IN))
    y.sum().backward()
    assert torch.equal(y[:, 7], torch.zeros(3))
    assert all(bool(each.grad.isfinite().all()) for each in module.parameters() if each.grad is not None)
    with torch.no_grad():
        assert bool(module.merged_weight(base.weight).isfinite().all())


def test_qalora_has_no_magnitudes() -> None:
    with pytest.raises(ConfigError, match="--dora True has no effect with --method qalora"):
        adapter_config(TrainConfig("m", "d", dora=True), "qalora")
    assert not hasattr(QALoRA(), "dora")
    kinds = {type(module) for module in _attached(LoRA(rank=2, dora=True)).modules()}
    assert DoRALinear in kinds


def _attached(config: LoRA) -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU())
    attach(model, config)
    return model
