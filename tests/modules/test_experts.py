"""Experts against transformers' own module, and their adapters against PEFT's, in float64."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lorafit.config import LoRA
from lorafit.formats import dequantize, quantize
from lorafit.modules import DenseExperts, Experts, LoRAExperts, PackedExperts, PackedWeight, adapters_disabled
from lorafit.modules.routing import Routing

EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 6, 128, 64, 23, 3
UNUSED = 4  # an expert that no token goes to
RANK = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized(out_dim: int, in_dim: int, name: str, seed: int) -> tuple[list[PackedWeight], Tensor]:
    """A packed matrix for each expert, and their weights [experts, out_dim, in_dim] in float64."""
    weights = torch.randn(EXPERTS, out_dim, in_dim, generator=torch.Generator().manual_seed(seed)) * in_dim**-0.5
    packed = [quantize(matrix, name) for matrix in weights]
    dense = [dequantize(blocks, name, (out_dim, in_dim), constants).double() for blocks, constants in packed]
    return [PackedWeight(blocks, name, constants=constants) for blocks, constants in packed], torch.stack(dense)


def both(formats: tuple[str, str, str] = ("Q4_1", "F16", "Q8_0")) -> tuple[Experts, Qwen3MoeExperts]:
    """lorafit's experts with gate, up and down in these formats, and transformers' of the same weights in float64."""
    shapes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    (gate, gate_w), (up, up_w), (down, down_w) = (
        quantized(*shape, name, seed) for seed, (shape, name) in enumerate(zip(shapes, formats, strict=True))
    )
    theirs = oracle(torch.cat((gate_w, up_w), dim=1), down_w)
    gate_up_stack = PackedExperts(list(zip(gate, up, strict=True)), sums=False)
    return Experts(gate_up_stack, PackedExperts([[part] for part in down], sums=True), nn.SiLU()), theirs


def oracle(gate_up: Tensor, down: Tensor) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).to(gate_up.dtype).requires_grad_(False)
    theirs.gate_up_proj.copy_(gate_up)
    theirs.down_proj.copy_(down)
    return theirs


def routed(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and their weights, as a router gives them; one expert gets no token."""
    others = torch.tensor([expert for expert in range(EXPERTS) if expert != UNUSED])
    index = torch.stack([others[torch.randperm(len(others))[:CHOSEN]] for _ in range(tokens)])
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64).to(dtype).requires_grad_()
    return x, index, torch.rand(tokens, CHOSEN, dtype=torch.float64).to(dtype).requires_grad_()


def check_equal(ours: Any, theirs: Any, tokens: int = TOKENS, parameters: Any = ((), ())) -> None:
    """Results and gradients, all in float64, so that only the order of sums differs."""
    x, index, weights = routed(tokens)
    grad = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    results = []
    for module, trained in zip((ours, theirs), parameters, strict=True):
        y = module(x, index, weights)
        results.append((y, *torch.autograd.grad(y, (x, weights, *trained), grad)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [TOKENS, 1])
@pytest.mark.parametrize("formats", [("Q4_1", "F16", "Q8_0"), ("F32", "F32", "F32"), ("Q5_0", "MXFP4", "NF4_DQ")])
def test_packed_experts_compute_what_transformers_does(formats: tuple[str, str, str], tokens: int) -> None:
    ours, theirs = both(formats)
    check_equal(ours, theirs, tokens)
    assert not [name for name, parameter in ours.named_parameters() if parameter.requires_grad]


def test_dense_experts_compute_what_transformers_does() -> None:
    _, theirs = both()
    gate_up, down = DenseExperts(theirs.gate_up_proj, sums=False), DenseExperts(theirs.down_proj, sums=True)
    check_equal(Experts(gate_up, down, theirs.act_fn), theirs)
    assert gate_up.format_name == "float64"


def test_every_expert_or_a_single_one() -> None:
    ours, theirs = both()
    x, _, _ = routed()
    for index in (torch.arange(EXPERTS).expand(TOKENS, -1), torch.full((TOKENS, 1), 2)):
        weights = torch.rand(index.shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights), rtol=1e-11, atol=1e-11)


def test_no_token_at_all() -> None:
    ours, _ = both()
    x = torch.empty(0, HIDDEN)
    assert ours(x, torch.empty(0, CHOSEN, dtype=torch.int64), torch.empty(0, CHOSEN)).shape == (0, HIDDEN)


def test_groups_of_few_sizes_change_nothing() -> None:
    ours, _ = both()
    adapters = with_adapters(ours)
    inputs, grad = routed(400), torch.randn(400, HIDDEN, dtype=torch.float64)
    results = []
    for few_sizes in (False, True):
        routing = Routing.of(inputs[1], EXPERTS, few_sizes=few_sizes)
        sizes = [group.stop - group.start for _, group in routing.groups]
        assert len(sizes) == EXPERTS - 1
        assert all(size % 16 == 0 for size in sizes) == few_sizes
        assert sum(sizes) <= 400 * CHOSEN * (9 / 8 if few_sizes else 1)
        gate, up = ours.gate_up_proj(inputs[0], routing).chunk(2, dim=-1)
        y = ours.down_proj(gate.sigmoid() * up * routing.weights(inputs[2])[:, None], routing)
        trained = [p for adapter in adapters for p in adapter.adapter_parameters().values()]
        results.append((y, *torch.autograd.grad(y, (inputs[0], inputs[2], *trained), grad)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_groups_come_in_eight_sizes_between_powers_of_two() -> None:
    sizes = set()
    for count in range(1, 4097):
        routing = Routing.of(torch.zeros(count, 1, dtype=torch.int64), 2, few_sizes=True)
        ((_, group),) = routing.groups
        assert count <= group.stop <= max(16 * -(-count // 16), count * 9 / 8)
        sizes.add(group.stop)
    assert len(sizes) == 8 + 5 * 8  # multiples of 16 up to 128, then 8 in each of 5 octaves


def test_an_expert_without_a_token_is_not_touched() -> None:
    _, theirs = both()
    x, index, weights = routed()
    expected = theirs(x, index, weights)
    theirs.gate_up_proj[UNUSED], theirs.down_proj[UNUSED] = math.nan, math.nan
    stacks = DenseExperts(theirs.gate_up_proj, sums=False), DenseExperts(theirs.down_proj, sums=True)
    y = Experts(*stacks, theirs.act_fn)(x, index, weights)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_without_a_gradient_few_tokens_go_through_the_fused_kernel(tokens: int) -> None:
    ours, theirs = both(("Q4_1", "Q4_1", "Q4_1"))
    x, index, weights = (t.float() if t.is_floating_point() else t for t in routed(tokens))
    with torch.no_grad():
        # float32 against float64, sums of a hundred terms of size 1.
        torch.testing.assert_close(ours(x, index, weights), theirs.float()(x, index, weights), rtol=0, atol=2e-6)


def test_in_bfloat16_better_than_transformers() -> None:
    ours, theirs = both()
    x, _, _ = routed(200, torch.bfloat16)
    index = torch.arange(EXPERTS).expand(200, -1)
    weights = torch.rand(index.shape).bfloat16().requires_grad_()
    grad = torch.randn(200, HIDDEN, dtype=torch.bfloat16)
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, weights)]
    exact = theirs(exact_inputs[0], index, exact_inputs[1])
    expected = (exact, *torch.autograd.grad(exact, exact_inputs, grad.double()))
    errors = []
    for module in (ours, oracle(theirs.gate_up_proj.bfloat16(), theirs.down_proj.bfloat16())):
        y = module(x, index, weights)
        found = (y, *torch.autograd.grad(y, (x, weights), grad))
        assert all(t.dtype == torch.bfloat16 for t in found)
        errors.append([((t.double() - e).norm() / e.norm()).item() for t, e in zip(found, expected, strict=True)])
    # Both round to 8 bits after each product; theirs after each sum of results and of gradients too.
    (y, dx, dw), (their_y, their_dx, their_dw) = errors
    assert y < 0.95 * their_y
    assert dx < 0.95 * their_dx
    assert dw < 1.1 * their_dw


def saved_sizes(module: nn.Module, *inputs: Tensor) -> list[int]:
    """Numbers in each of the tensors that are kept for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(*inputs)
    assert y.requires_grad
    return sorted(kept.values())


def test_nothing_of_the_unpacked_weights_and_nothing_as_wide_as_all_pairs_is_kept() -> None:
    ours, _ = both()
    pairs = TOKENS * CHOSEN
    few = 4 * pairs  # numbers of pairs, tokens and weights
    # G x and U x.
    assert sum(saved_sizes(ours, *routed())) <= pairs * 2 * INNER + few
    with_adapters(ours)
    adapters = sum(parameter.numel() for parameter in ours.parameters() if parameter.requires_grad)
    # The input and the gated product too, and A x of both.
    expected = TOKENS * HIDDEN + pairs * (3 * INNER + 2 * RANK) + adapters
    assert sum(saved_sizes(ours, *routed())) <= expected + few


def with_adapters(experts: Experts) -> tuple[LoRAExperts, LoRAExperts]:
    """Both stacks adapted, with A and B random and in float64."""
    config = LoRA(rank=RANK, alpha=5.0, scaling="rslora")
    pair = LoRAExperts(experts.gate_up_proj, config).double(), LoRAExperts(experts.down_proj, config).double()  # type: ignore[arg-type]
    for adapter in pair:
        nn.init.normal_(adapter.lora_B, std=0.3)
    experts.gate_up_proj, experts.down_proj = pair
    return pair


class Holder(nn.Module):
    """PEFT adapts parameters of a module inside of a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def in_peft(theirs: nn.Module, gate_up: LoRAExperts, down: LoRAExperts) -> tuple[nn.Module, list[nn.Parameter]]:
    """The same adapters in PEFT, and their parameters in the order A, B of gate_up_proj, A, B of down_proj."""
    config = LoraConfig(
        r=RANK, lora_alpha=5.0, use_rslora=True, target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=[],
    )  # fmt: skip
    peft = get_peft_model(Holder(theirs), config)  # type: ignore[arg-type]
    outer = peft.base_model.model.experts
    parameters = []
    for wrapper, adapter in ((outer.base_layer, gate_up), (outer, down)):
        for layer, factor in zip((wrapper.lora_A, wrapper.lora_B), adapter.lora_factors(), strict=True):
            assert layer["default"].weight.shape == factor.shape
            layer["default"].weight.data = factor.clone()
            parameters.append(layer["default"].weight)
    return peft, parameters


def test_adapters_compute_what_peft_computes() -> None:
    ours, theirs = both()
    adapters = with_adapters(ours)
    peft, parameters = in_peft(theirs, *adapters)
    x, index, weights = routed()
    grad = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    trained = [p for adapter in adapters for p in adapter.adapter_parameters().values()]
    mine = torch.autograd.grad(ours(x, index, weights), (x, weights, *trained), grad)
    y = peft(x, index, weights)
    other = torch.autograd.grad(y, (x, weights, *parameters), grad)
    torch.testing.assert_close(ours(x, index, weights), y, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, index, weights), y, rtol=1e-11, atol=1e-11)
    assert float((y - theirs(x, index, weights)).detach().abs().max()) > 0.1
    for one, two in zip(mine[:2], other[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    # Gradients of the factors, in PEFT's layout, by way of a stack that holds them.
    for adapter, of_a, of_b, a, b in zip(adapters, mine[2::2], mine[3::2], other[2::2], other[3::2], strict=True):
        adapter.lora_A.data, adapter.lora_B.data = of_a, of_b
        torch.testing.assert_close(adapter.lora_factors(), (a, b), rtol=1e-11, atol=1e-11)
        assert not of_a[UNUSED].any()
        assert of_a[:UNUSED].flatten(1).any(1).all()


def test_the_update_of_the_weights() -> None:
    ours, theirs = both()
    x, index, weights = routed()
    gate_up, down = with_adapters(ours)
    with torch.no_grad():
        theirs.gate_up_proj += gate_up.delta_weight()
        theirs.down_proj += down.delta_weight()
    torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights), rtol=1e-11, atol=1e-11)


def test_starts_as_the_base_and_can_step_aside() -> None:
    ours, _ = both()
    x, index, weights = routed(dtype=torch.bfloat16)
    before = ours(x, index, weights)
    gate_up, down = with_adapters(ours)
    assert not torch.equal(ours(x, index, weights), before)
    with adapters_disabled(ours):
        assert torch.equal(ours(x, index, weights), before)
    nn.init.zeros_(gate_up.lora_B)
    nn.init.zeros_(down.lora_B)
    assert torch.equal(ours(x, index, weights), before)
    fresh = LoRAExperts(gate_up.base, LoRA(rank=40))
    assert not fresh.lora_B.any()
    assert fresh.lora_A.dtype == fresh.lora_B.dtype == torch.float32
    # Uniform within 1/√HIDDEN: 30,720 draws reach within 0.1% of the bound and know the deviation, bound/√3, to 1%.
    bound = HIDDEN**-0.5
    assert bound * 0.999 < float(fresh.lora_A.detach().abs().max()) <= bound
    assert float(fresh.lora_A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_checkpointed_layers_have_the_same_gradients() -> None:
    ours, _ = both()
    adapters = with_adapters(ours)
    inputs, results = routed(), []
    for use_reentrant in (None, True, False):
        ours.zero_grad()
        y = ours(*inputs) if use_reentrant is None else checkpoint(ours, *inputs, use_reentrant=use_reentrant)
        y.square().sum().backward()
        results.append([parameter.grad for adapter in adapters for parameter in adapter.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-11)
