"""LoRA's hand-written gradients against plain autograd, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorafit.config import LoRA
from lorafit.errors import ConfigError
from lorafit.modules import LoRALinear, PackedLinear, PackedWeight
from tests.oracles.adapted import fill, q4_1, q4_1_parts

OUT, IN, RANK = 48, 96, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed_base(bias: bool = True) -> tuple[PackedLinear, Tensor]:
    """A packed layer with permuted rows, and its weight."""
    blocks, rows = q4_1(OUT, IN), torch.arange(OUT).roll(5)
    scaled, offsets = q4_1_parts(blocks)
    weight = (scaled + offsets.repeat_interleave(32, 1))[rows]
    layer = PackedLinear(
        PackedWeight(torch.from_numpy(blocks), "Q4_1", rows=rows), torch.linspace(-1, 1, OUT) if bias else None
    )
    return layer, weight


def ordinary_base(bias: bool = True) -> tuple[nn.Linear, Tensor]:
    layer = nn.Linear(IN, OUT, bias=bias).double()
    return layer, layer.weight.detach()


def plain(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Equation 3 of the paper."""
    y = x @ weight.T + scale * ((z @ a.T) @ b.T)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("base_kind", [packed_base, ordinary_base])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("scaling", "scale"), [("standard", 6.0 / 4), ("rslora", 6.0 / 2), ("plain", 6.0)])
def test_forward_and_gradients_equal_plain_autograd(
    base_kind: Any, bias: bool, dropout: float, scaling: Any, scale: float
) -> None:
    base, weight = base_kind(bias)
    module = LoRALinear(base, LoRA(rank=RANK, alpha=6.0, scaling=scaling, dropout=dropout)).train()
    module.lora_A.data, module.lora_B.data = module.lora_A.data.double(), torch.randn(OUT, RANK, dtype=torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (module.lora_A, module.lora_B))
    x = torch.randn(2, 7, IN, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(2, 7, OUT, dtype=torch.float64)

    torch.manual_seed(3)
    y = module(x)
    y.backward(grad)
    torch.manual_seed(3)
    z = F.dropout(twin, dropout) if dropout else twin
    expected = plain(twin, z, weight, base.bias, a, b, scale)
    expected.backward(grad)
    # Both in float64.
    for ours, theirs in (
        (y, expected),
        (x.grad, twin.grad),
        (module.lora_A.grad, a.grad),
        (module.lora_B.grad, b.grad),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_gradcheck() -> None:
    base, _ = packed_base()
    module = LoRALinear(base, LoRA(rank=2)).double()
    fill(module, std=1.0)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def through(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"lora_A": a, "lora_B": b}, (x,))

    torch.autograd.gradcheck(through, (x, module.lora_A, module.lora_B), fast_mode=True)


def test_an_input_without_gradient_still_trains_the_adapter() -> None:
    base, _ = packed_base()
    module = LoRALinear(base, LoRA(rank=RANK, dropout=0.5))
    module(torch.randn(4, IN)).square().sum().backward()
    assert module.lora_B.grad is not None
    assert module.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_to_the_last_bit(dtype: torch.dtype) -> None:
    base, _ = packed_base()
    module = LoRALinear(base, LoRA(rank=RANK))
    x = torch.randn(9, IN, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(module(x), base(x))
    x.requires_grad_()
    assert torch.equal(module(x), base(x))


def test_training_and_inference_agree() -> None:
    base, weight = packed_base()
    module = LoRALinear(base, LoRA(rank=RANK, dropout=0.5)).eval()
    fill(module, std=1.0)
    x = torch.randn(1, 9, IN)
    with torch.no_grad():
        without_gradient = module(x)
    # float32, products in another order; values of size 5.
    torch.testing.assert_close(without_gradient, module(x), rtol=0, atol=1e-4)
    merged = module.merged_weight(weight.float())
    torch.testing.assert_close(without_gradient, F.linear(x, merged, base.bias), rtol=0, atol=1e-4)


def test_bfloat16_gradients_are_rounded_and_no_worse() -> None:
    base, weight = packed_base(bias=False)
    module = LoRALinear(base, LoRA(rank=RANK))
    fill(module, std=0.2)
    a, b = (p.detach().double().requires_grad_() for p in (module.lora_A, module.lora_B))
    x = torch.randn(200, IN, dtype=torch.bfloat16, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    grad = torch.randn(200, OUT, dtype=torch.bfloat16)
    module(x).backward(grad)
    plain(twin, twin, weight, None, a, b, module.scale).backward(grad.double())
    for ours, theirs in ((x.grad, twin.grad), (module.lora_A.grad, a.grad), (module.lora_B.grad, b.grad)):
        assert ours is not None
        assert theirs is not None
        # bfloat16 has 8 bits, so a product is off by 2^-9 at most, and their errors average out in the sum.
        assert (ours.double() - theirs).norm() < 2**-8 * theirs.norm()


def test_dropout_acts_in_training_only_and_under_activation_checkpointing() -> None:
    base, _ = packed_base(bias=False)
    module = LoRALinear(base, LoRA(rank=RANK, alpha=4.0, dropout=0.25))
    fill(module, std=1.0)
    x = torch.randn(4, IN, requires_grad=True)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    # A quarter of the inputs is dropped and the rest scaled up: on average nothing changes.
    module.train()
    with torch.no_grad():
        mean = module(x.expand(3000, 4, IN)).mean(0)
        # Terms of the update vary by √(1/3) each; 3000 draws leave 1% of that, its size being about 3.
        torch.testing.assert_close(mean, module.eval()(x), rtol=0, atol=0.25)

    grads = []
    module.train()
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=True)):
        module.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        grads.append(module.lora_B.grad)
    # The checkpointed pass runs twice, first without gradients, and must drop the same inputs both times.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_initial_values() -> None:
    torch.manual_seed(0)
    module = LoRALinear(nn.Linear(1024, 64).to(torch.bfloat16), LoRA(rank=64))
    assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
    assert not module.lora_B.any()
    bound = 1 / math.sqrt(1024)
    values = module.lora_A.detach().flatten().numpy()
    assert bound * 0.999 < np.abs(values).max() <= bound
    # Uniform: the standard deviation is bound/√3; 65,536 draws know it to 0.3%.
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        *[{"rank": 0}, {"rank": -1}, {"alpha": 0.0}, {"alpha": math.inf}, {"dropout": 1.0}, {"dropout": -0.1}],
        {"scaling": "rsLoRA"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LoRA(**settings)
