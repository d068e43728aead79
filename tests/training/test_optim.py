"""Schedules by hand, the rule for the learning rate, clipping, and AdamW written out for one number."""

import math

import pytest
import torch
from torch import nn

from lorafit.training.optim import clip_gradients, default_learning_rate, learning_rate_at, make_optimizer


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1.0, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]),
        ("constant", [0.5, *[1.0] * 9]),
    ],
)
def test_ten_steps_of_which_two_warm_up(decay: str, expected: list[float]) -> None:
    rates = [learning_rate_at(step, 10, peak=3.0, warmup=0.2, decay=decay) for step in range(10)]  # type: ignore[arg-type]
    assert rates == pytest.approx([3.0 * rate for rate in expected])


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_every_step_learns_and_none_above_the_peak(decay: str, steps: int, warmup: float) -> None:
    rates = [learning_rate_at(s, steps, peak=1.0, warmup=warmup, decay=decay) for s in range(steps)]  # type: ignore[arg-type]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert max(rates) == 1.0
    top = rates.index(1.0)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


def test_default_rates_fall_with_the_width() -> None:
    # Rounded to two digits.
    assert default_learning_rate("lora", 576) == 2.6e-3  # 1.5 / 576 = 0.00260
    assert default_learning_rate("lora", 4096) == 3.7e-4  # 1.5 / 4096 = 0.000366
    assert default_learning_rate("qalora", 576) == 5.2e-3


def test_clipping_by_hand() -> None:
    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
        made[0].grad, made[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
        return made  # the third has no gradient

    for limit, factor in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        ps = parameters()
        assert float(clip_gradients(ps, limit)) == pytest.approx(5.0)
        assert ps[0].grad is not None
        assert ps[1].grad is not None
        # torch adds 1e-6 to the norm that it divides by.
        assert ps[0].grad.tolist() == pytest.approx([3.0 * factor, 0.0], rel=1e-6)
        assert ps[1].grad.tolist() == pytest.approx([-4.0 * factor], rel=1e-6)


def test_adamw_written_out() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer([parameter], weight_decay=0.1)
    value, first, second = 2.0, 0.0, 0.0
    for step, (grad, rate) in enumerate([(0.5, 0.01), (-1.5, 0.02), (0.1, 0.005)], start=1):
        parameter.grad = torch.tensor([grad])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        value -= rate * 0.1 * value  # decoupled: not part of the gradient
        value -= rate * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert parameter.item() == pytest.approx(value, rel=1e-6)  # float32
