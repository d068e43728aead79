"""QA-LoRA against a plain dense formulation in float64, and against the merged layer bit for bit."""

import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lorafit.config import QALoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.modules import PackedLinear, PackedWeight, QALoRALinear
from lorafit.modules.qalora import offsets_held
from tests.oracles.adapted import fill, q4_1, q4_1_parts, with_offsets
from tests.oracles.tiny_gguf import quantize

OUT, IN, GROUPS, RANK = 48, 160, 5, 3
ROWS = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(rows: Tensor | None = ROWS, bias: bool = False, blocks: np.ndarray | None = None) -> PackedLinear:
    packed = PackedWeight(
        torch.from_numpy(q4_1(OUT, IN) if blocks is None else blocks), "Q4_1", rows=rows, name="blk.0.x"
    )
    return PackedLinear(packed, torch.linspace(-1, 1, OUT) if bias else None)


def adapted(rows: Tensor | None = ROWS, bias: bool = False) -> QALoRALinear:
    torch.manual_seed(0)
    module = QALoRALinear(layer(rows, bias), QALoRA(rank=RANK, alpha=6.0))
    fill(module, std=0.05)
    return module


def through_half(x: Tensor) -> Tensor:
    """Rounding to half precision with the gradient of the identity."""
    return x + (x.detach().to(torch.float16).to(x.dtype) - x.detach())


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_equal_the_dense_formulation(rows: Tensor | None, bias: bool) -> None:
    module = adapted(rows, bias).double()
    a, b = (p.detach().clone().requires_grad_() for p in (module.qalora_A, module.qalora_B))
    x = torch.randn(2, 7, IN, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(2, 7, OUT, dtype=torch.float64)
    y = module(x)
    y.backward(grad)

    scaled, offsets = (part if rows is None else part[rows] for part in q4_1_parts(q4_1(OUT, IN)))
    merged = through_half(offsets + 2.0 * b @ a)  # alpha/rank = 2
    expected = twin @ (scaled + merged.repeat_interleave(32, 1)).T
    expected = expected + torch.linspace(-1, 1, OUT) if bias else expected
    expected.backward(grad)
    # d·q + m' is rounded to float32 in the module and not here: 2^-24 of each weight.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.qalora_A.grad, a.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module.qalora_B.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_bfloat16_gradients_are_rounded_and_no_worse() -> None:
    module, exact = adapted(), adapted().double()
    x = torch.randn(200, IN, dtype=torch.bfloat16, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    grad = torch.randn(200, OUT, dtype=torch.bfloat16)
    module(x).backward(grad)
    exact(twin).backward(grad.double())
    for ours, theirs in (
        (x.grad, twin.grad), (module.qalora_A.grad, exact.qalora_A.grad), (module.qalora_B.grad, exact.qalora_B.grad)
    ):  # fmt: skip
        assert ours is not None
        assert theirs is not None
        # bfloat16 has 8 bits, so sums and products are off by 2^-9 at most each, and the errors average out.
        assert (ours.double() - theirs).norm() < 2**-8 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 20])  # the fused kernel, and unpacking
@pytest.mark.parametrize("rows", [None, ROWS])
def test_computes_with_the_blocks_that_merging_writes(dtype: torch.dtype, tokens: int, rows: Tensor | None) -> None:
    module = adapted(rows)
    offsets = module.merged_offsets()
    in_file = offsets if rows is None else torch.empty_like(offsets).index_copy_(0, rows, offsets)
    merged = layer(rows, blocks=with_offsets(q4_1(OUT, IN), in_file))
    x = torch.randn(tokens, IN, dtype=dtype)
    with torch.no_grad():
        assert not torch.equal(module(x), module.base(x))
        assert torch.equal(module(x), merged(x))
    if tokens > 1:  # training unpacks for a single token too, where a frozen layer uses the fused kernel
        x.requires_grad_()
        assert torch.equal(module(x), merged(x))


def test_merged_offsets_are_the_rounded_sum() -> None:
    module = adapted()
    _, offsets = q4_1_parts(q4_1(OUT, IN))
    exact = offsets[ROWS] + 2.0 * module.qalora_B.detach().double() @ module.qalora_A.detach().double()
    found = module.merged_offsets()
    assert found.dtype == torch.float16
    # The float32 sum may round to the other neighbour where the exact one lies between two: half a unit and a little.
    unit = torch.from_numpy(np.spacing(np.abs(exact.half().numpy()))).double()
    assert bool(((found.double() - exact).abs() <= 0.501 * unit).all())


def test_update_as_a_matrix_and_as_plain_lora() -> None:
    module = adapted()
    blocks = q4_1(OUT, IN)
    merged = with_offsets(blocks[ROWS.numpy()], module.merged_offsets())
    q4 = gguf.GGMLQuantizationType.Q4_1
    moved = gguf.quants.dequantize(merged, q4) - gguf.quants.dequantize(blocks, q4)[ROWS.numpy()]
    # Differences of float32 numbers below 1.
    np.testing.assert_allclose(module.delta_weight().numpy(), moved, rtol=0, atol=1e-6)
    a, b = module.lora_factors()
    assert a.shape == (RANK, IN)
    # As plain LoRA only the rounding of m' is missing: half a unit of half precision, 2^-12 of offsets up to 0.5.
    np.testing.assert_allclose(module.scale * (b @ a).numpy(), moved, rtol=0, atol=0.5 * 2**-11)


def test_starts_as_the_base_to_the_last_bit() -> None:
    base = layer()
    module = QALoRALinear(base, QALoRA(rank=RANK))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(20, IN, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module(x), base(x))
        x.requires_grad_()
        assert torch.equal(module(x), base(x))


def test_initial_values() -> None:
    torch.manual_seed(0)
    blocks = q4_1(32, 2048)
    module = QALoRALinear(PackedLinear(PackedWeight(torch.from_numpy(blocks), "Q4_1")), QALoRA(rank=64))
    assert not module.qalora_B.any()
    values = module.qalora_A.detach().flatten().numpy()
    bound = 1 / math.sqrt(2048)
    assert bound * 0.995 < np.abs(values).max() <= bound
    # Uniform: the standard deviation is bound/√3; 4,096 draws know it to 1%.
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.04)


def test_held_offsets_stay_while_held() -> None:
    module = adapted().eval()
    x = torch.randn(6, IN)
    with torch.no_grad():
        before = module(x)
        with offsets_held(module):
            module.qalora_B.mul_(2.0)
            assert torch.equal(module(x), before)
            with offsets_held(module):
                assert torch.equal(module(x), before)
            assert torch.equal(module(x), before)
        after = module(x)
        assert not torch.equal(after, before)
        with pytest.raises(RuntimeError, match="stop"), offsets_held(module):
            raise RuntimeError("stop")
        module.qalora_B.div_(2.0)
        assert torch.equal(module(x), before)


def test_training_releases_what_is_held() -> None:
    module = adapted().eval()
    module.hold(torch.zeros(OUT, GROUPS, dtype=torch.float16))
    held = module.merged_offsets()
    module.train()
    assert not torch.equal(module.merged_offsets(), held)
    assert torch.equal(module.eval().merged_offsets(), adapted().merged_offsets())


def test_a_rank_above_the_blocks_of_a_row_is_refused() -> None:
    QALoRALinear(layer(), QALoRA(rank=GROUPS))
    with pytest.raises(AdapterError, match=r"blk\.0\.x: rank 6 exceeds the 5 blocks .* --rank 5 or less"):
        QALoRALinear(layer(), QALoRA(rank=GROUPS + 1))


def test_a_format_without_offsets_is_refused() -> None:
    blocks = gguf.quants.quantize(np.ones((8, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(AdapterError, match=r"blk\.1\.y: Q8_0 blocks have no offset"):
        QALoRALinear(PackedLinear(PackedWeight(torch.from_numpy(blocks), "Q8_0", name="blk.1.y")), QALoRA(rank=1))


PROMOTED = {"Q4_0": "Q4_1", "Q5_0": "Q5_1", "Q4_K": "Q4_1", "Q5_K": "Q5_1"}


def promoted(format_name: str, rank: int = RANK) -> tuple[QALoRALinear, np.ndarray]:
    """A layer in a format without offsets, and what gguf-py makes of its blocks, rows in the layer's order."""
    torch.manual_seed(0)
    weights = np.random.default_rng(0).standard_normal((OUT, 256)).astype(np.float32) / 16
    blocks = quantize(weights, format_name)  # type: ignore[arg-type]
    packed = PackedWeight(torch.from_numpy(blocks), format_name, rows=ROWS, name="blk.0.x")
    module = QALoRALinear(PackedLinear(packed), QALoRA(rank=rank, alpha=6.0))
    return module, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format_name])[ROWS.numpy()]


@pytest.mark.parametrize("format_name", PROMOTED)
def test_a_promoted_layer_starts_as_the_base_or_near_it(format_name: str) -> None:
    module, weights = promoted(format_name)
    assert module.promoted is not None
    assert module.trained.format_name == PROMOTED[format_name]
    assert module.base.packed.format_name == format_name
    x = torch.randn(20, 256)
    with torch.no_grad():
        y = module(x)
        module.enabled = False
        # With the adapter disabled it is the file's layer.
        assert torch.equal(module(x), x @ torch.from_numpy(weights).T)
        start = module.trained.dense(torch.float32).clone().numpy()
    if format_name in ("Q4_0", "Q5_0"):
        np.testing.assert_array_equal(start, weights)
        assert torch.equal(y, x @ torch.from_numpy(weights).T)
    else:
        # d and m are rounded to half precision, by 2.8e-4 of themselves on average; d·q and m are each about twice as
        # large as the weights of this bell curve.
        error = np.sqrt(((start - weights) ** 2).mean() / (weights**2).mean())
        assert 4e-4 < error < 1e-3


@pytest.mark.parametrize("format_name", PROMOTED)
def test_a_promoted_layer_trains_its_offsets(format_name: str) -> None:
    module, _ = promoted(format_name)
    assert module.group == 32
    assert module.qalora_A.shape == (RANK, 8)
    start = module.trained.dense(torch.float32).clone().double()
    fill(module, std=0.5)
    a, b = (p.detach().double().requires_grad_() for p in (module.qalora_A, module.qalora_B))
    x, grad = torch.randn(7, 256), torch.randn(7, OUT)
    y = module(x)
    y.backward(grad)
    moved = start + (2.0 * b @ a).repeat_interleave(32, 1)
    expected = x.double() @ moved.T
    expected.backward(grad.double())
    # m' is rounded to half precision, 2^-11 of offsets up to 2, in sums of 256 products; gradients are float32 sums.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.05)
    assert float((expected.detach() - x.double() @ start.T).abs().mean()) > 0.2
    for ours, theirs in ((module.qalora_A.grad, a.grad), (module.qalora_B.grad, b.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    plain_a, plain_b = module.lora_factors()
    # As plain LoRA only the rounding of m' is missing.
    np.testing.assert_allclose((2.0 * plain_b @ plain_a).numpy(), module.delta_weight().numpy(), rtol=0, atol=2**-10)


def test_the_rank_limit_of_a_k_quant_is_that_of_the_promoted_format() -> None:
    promoted("Q4_K", rank=8)
    with pytest.raises(AdapterError, match=r"blk\.0\.x: rank 9 exceeds the 8 blocks in a row"):
        promoted("Q4_K", rank=9)


def test_scales_too_large_to_be_promoted_are_refused() -> None:
    blocks = quantize(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32), "Q4_0")
    blocks.reshape(-1, 18)[3, :2] = np.array([10000.0], "<f2").view(np.uint8)  # eight times that is no half any more
    packed = PackedWeight(torch.from_numpy(blocks), "Q4_0", name="blk.0.x")
    with pytest.raises(AdapterError, match=r"blk\.0\.x: some of its Q4_0 scales are too large .* --targets"):
        QALoRALinear(PackedLinear(packed), QALoRA(rank=1))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": -1.0}, {"alpha": math.nan}, {"frozen_tensors": "qlora"}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        QALoRA(**settings)
