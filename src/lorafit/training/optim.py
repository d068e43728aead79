"""Learning rates and the optimiser.

The best learning rate of LoRA is about ten times that of full fine-tuning, hardly depends on the rank when the update
is scaled by alpha/rank, and falls with the width of the model. With Adam a matrix wants a rate in proportion to 1/width
(arXiv 2203.03466), and 1.5/width is what serves SmolLM2-135M: 2.6e-3. For a width of 4,096 it gives 3.7e-4, close to
what "LoRA without regret" (Schulman and others, 2025) measured there. QA-LoRA's update reaches the weights through sums
over blocks and takes twice that rate. benchmarks/README.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lorafit.config import Method

_BETAS = (0.9, 0.999)


def default_learning_rate(method: Method, width: int) -> float:
    """Peak learning rate for a method and the width of a model's hidden states, to two digits."""
    rate = 1.5 / width * (2.0 if method == "qalora" else 1.0)
    return float(f"{rate:.1e}")


def learning_rate_at(
    step: int, steps: int, *, peak: float, warmup: float, decay: Literal["cosine", "linear", "constant"]
) -> float:
    """The learning rate of zero-based ``step``: a linear rise over the share ``warmup`` of the steps, then the decay.

    The first step already has a rate above zero, and the last one too.
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    left = (steps - step) / max(steps - rising, 1)
    if decay == "linear":
        return peak * left
    if decay == "cosine":
        return peak * 0.5 * (1.0 - math.cos(math.pi * left))
    return peak


def make_optimizer(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused pass; its learning rate is set at every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=_BETAS, weight_decay=weight_decay, fused=True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a joint norm of ``max_norm`` (0: leave them); returns the norm before."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
