"""Layers that share an input give as one product what they give one by one, and gradients too."""

from collections.abc import Callable, Sequence

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.config import LoRA, QALoRA
from lorafit.modules import LoRALinear, PackedLinear, PackedWeight, QALoRALinear
from lorafit.modules.shared import apply_all, lay_together
from tests.oracles.adapted import fill

IN = 96


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(out_dim: int, format_name: str = "Q4_1", bias: bool = False) -> PackedLinear:
    weights = np.random.default_rng(out_dim).standard_normal((out_dim, IN)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quants.quantize(weights, gguf.GGMLQuantizationType[format_name]))
    weight = PackedWeight(blocks, format_name, rows=torch.arange(out_dim).roll(5), name="x")
    return PackedLinear(weight, torch.linspace(-1, 1, out_dim) if bias else None)


def dense(out_dim: int, bias: bool = False) -> nn.Linear:
    """Of values that bfloat16 has."""
    layer = nn.Linear(IN, out_dim, bias=bias).requires_grad_(False)
    return layer.bfloat16().float()


def lora(base: nn.Module, rank: int = 4, dropout: float = 0.0) -> LoRALinear:
    return LoRALinear(base, LoRA(rank=rank, alpha=6.0, dropout=dropout))


def qalora(base: PackedLinear, rank: int = 3) -> QALoRALinear:
    return QALoRALinear(base, QALoRA(rank=rank, alpha=6.0))


def disabled(module: LoRALinear) -> LoRALinear:
    module.enabled = False
    module.requires_grad_(False)
    return module


class Other(LoRALinear):
    """An adapter that nothing here knows."""


JOINED: dict[str, Callable[[], list[nn.Module]]] = {
    "LoRA beside packed layers": lambda: [lora(packed(64)), lora(packed(32)), lora(packed(48), rank=2)],
    "LoRA beside ordinary layers": lambda: [lora(dense(64, bias=True)), lora(dense(32))],
    "LoRA on two of three": lambda: [lora(packed(64, bias=True)), packed(32, "Q8_0", bias=True), lora(dense(32))],
    "only the last has an adapter": lambda: [packed(64), dense(32), lora(packed(32))],
    "one is disabled": lambda: [lora(packed(64)), disabled(lora(packed(32)))],
    "QA-LoRA": lambda: [qalora(packed(64)), qalora(packed(32, bias=True)), qalora(packed(32), rank=2)],
    "QA-LoRA, promoted": lambda: [qalora(packed(64, "Q4_0")), qalora(packed(32)), qalora(packed(32, "Q5_0"))],
    "QA-LoRA and a frozen layer": lambda: [packed(64, "Q8_0"), qalora(packed(32))],
    "both kinds and a frozen layer": lambda: [lora(packed(64)), qalora(packed(32)), dense(32), lora(dense(16))],
}  # fmt: skip
APART: dict[str, Callable[[], list[nn.Module]]] = {
    "dropout": lambda: [lora(packed(64), dropout=0.5), lora(packed(32), dropout=0.5)],
    "no adapter": lambda: [packed(64), packed(32)],
    "a layer that is trained": lambda: [lora(packed(64)), nn.Linear(IN, 32)],
    "another adapter": lambda: [lora(packed(64)), Other(packed(32), LoRA(rank=2))],
}


def filled(layers: Sequence[nn.Module]) -> nn.ModuleList:
    stack = nn.ModuleList(layers).double()
    fill(stack, std=0.1)
    return stack


def one_by_one(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in layers]


def results(layers: nn.ModuleList, apply: Callable[..., list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Values, and gradients of the input and of all that is trained."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    trained = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    values = apply(layers, x)
    # Each result counts otherwise, and squares make each gradient depend on the values.
    loss = sum((i + 1) * value.double().square().mean() for i, value in enumerate(values))
    assert isinstance(loss, Tensor)
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, [x, *trained])]


def is_one_tensor(values: Sequence[Tensor]) -> bool:
    return len({value.untyped_storage().data_ptr() for value in values}) == 1


@pytest.mark.parametrize("kind", JOINED)
def test_one_product_equals_one_by_one(kind: str) -> None:
    layers = filled(JOINED[kind]())
    # float64 throughout, from the same unpacked weights: sums in another order.
    for found, expected in zip(
        results(layers, apply_all, torch.float64), results(layers, one_by_one, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", JOINED)
def test_bfloat16_is_as_good_as_one_by_one(kind: str) -> None:
    exact = results(filled(JOINED[kind]()), one_by_one, torch.float64)
    torch.manual_seed(0)
    layers = filled(JOINED[kind]()).float()
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    found, usual = (results(layers, apply, torch.bfloat16) for apply in (apply_all, one_by_one))
    assert len(found) == len(exact)
    for one, other, true in zip(found, usual, exact, strict=True):
        errors = [float((each.double() - true).norm() / true.norm()) for each in (one, other)]
        # Values are rounded to 8 bits a few times in both, in other places: measured within 1.2 of one another.
        assert errors[0] < 1.5 * errors[1] + 1e-6
        assert errors[0] < 0.02


@pytest.mark.parametrize("kind", JOINED)
def test_layers_whose_adapters_are_known_are_joined(kind: str) -> None:
    layers = filled(JOINED[kind]())
    for layer in layers:
        getattr(layer, "base", layer).bias = None  # what a bias is added to is a tensor of its own
    assert is_one_tensor(apply_all(layers, torch.randn(5, IN, dtype=torch.float64)))


@pytest.mark.parametrize("kind", APART)
def test_others_are_called_one_by_one(kind: str) -> None:
    layers = filled(APART[kind]())
    called: list[nn.Module] = []
    for layer in layers:
        forward = layer.forward
        layer.forward = lambda x, layer=layer, forward=forward: (called.append(layer), forward(x))[1]
    assert not is_one_tensor(apply_all(layers, torch.randn(5, IN, dtype=torch.float64)))
    assert called == list(layers)


@pytest.mark.parametrize("base", [False, True])
def test_a_hook_sees_its_layer_called(base: bool) -> None:
    layers = filled(JOINED["LoRA on two of three"]())
    seen: list[Tensor] = []
    watched = layers[0].base if base else layers[0]
    watched.register_forward_hook(lambda _, inputs, y: seen.append(y))  # type: ignore[union-attr]
    x = torch.randn(5, IN, dtype=torch.float64)
    with torch.no_grad() if base else torch.enable_grad():
        apply_all(layers, x)
    assert len(seen) == 1


def test_without_a_gradient_layers_are_called_one_by_one() -> None:
    layers = filled(JOINED["QA-LoRA"]())
    x = torch.randn(5, IN, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(apply_all(layers, x), one_by_one(layers, x), strict=True):
            assert torch.equal(found, expected)


def test_gradients_that_are_columns_of_one_tensor_and_those_that_are_not_count_alike() -> None:
    layers = filled(JOINED["LoRA beside packed layers"]())
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    both = torch.randn(5, 64 + 32 + 48, dtype=torch.float64)
    columns = both.split([64, 32, 48], 1)
    a, b, c = columns
    cases = [columns, [each.clone() for each in columns], [a, b.clone(), c], [a.flip(0).flip(0), b, c]]
    grads = [torch.autograd.grad(apply_all(layers, x), [x], list(case))[0] for case in cases]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LoRA on two of three", "QA-LoRA, promoted"])
def test_recomputing_changes_nothing(kind: str) -> None:
    layers = filled(JOINED[kind]())

    def again(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
        return checkpoint(apply_all, layers, x, use_reentrant=False)

    plain, recomputed = (results(layers, apply, torch.float64) for apply in (apply_all, again))
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_weights_that_lie_together_are_multiplied_where_they_are() -> None:
    layers = [lora(dense(64, bias=True)), dense(32), lora(dense(16))]
    x = torch.randn(2, 5, IN)
    for each in layers:
        if isinstance(each, LoRALinear):
            nn.init.normal_(each.lora_B)
    expected = apply_all(layers, x)
    lay_together(layers)
    found = apply_all(layers, x)
    # The same numbers multiplied; not the same blocks of memory.
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    frozen = [layer.base.weight if isinstance(layer, LoRALinear) else layer.weight for layer in layers]
    assert len({weight.untyped_storage().data_ptr() for weight in frozen}) == 1  # type: ignore[union-attr, operator]
    with torch.no_grad():
        frozen[1].mul_(2)  # type: ignore[operator]
    # What is computed with are these weights and no copy of them.
    torch.testing.assert_close(apply_all(layers, x)[1], 2 * expected[1])
