"""QA-LoRA against a plain dense formulation in float64, and against the merged layer bit for bit."""

import math

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


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": -1.0}, {"alpha": math.nan}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        QALoRA(**settings)  # type: ignore[arg-type]
