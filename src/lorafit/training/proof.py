"""What is checked while training, so that nothing fails in silence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lorafit.data.packing import Batch
from lorafit.errors import TrainingError
from lorafit.modules import TrainedTokens, adapter_modules


def check_first_gradients(model: nn.Module) -> None:
    """After the first backward pass every adapter must have received a gradient.

    The adapter of a stack of experts counts as one: an expert that got no token has had nothing to learn from yet. Nor
    have single tokens' rows of an embedding, if none of the documents has such a token.

    Raises:
        TrainingError: Some adapters had none; they are named.
    """
    silent = []
    for name, module in adapter_modules(model).items():
        grads = [parameter.grad for parameter in module.adapter_parameters().values()]
        if not isinstance(module, TrainedTokens) and not any(
            grad is not None and bool(torch.count_nonzero(grad)) for grad in grads
        ):
            silent.append(name)
    if silent:
        rest = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
        raise TrainingError(
            f"{len(silent)} adapters had no gradient in the first step, so they cannot learn: "
            f"{', '.join(silent[:5])}{rest}; leave them out with --targets"
        )


def check_finite(value: float, what: str, step: int, batches: Sequence[Batch]) -> None:
    """Stop at a loss or gradient norm that is no number.

    Raises:
        TrainingError: It is not finite; step and rows are named.
    """
    if math.isfinite(value):
        return
    sources = [source for batch in batches for source in batch.sources]
    raise TrainingError(
        f"the {what} is {value} in step {step}, on {', '.join(sources)}; nothing of this step was kept; "
        "try a lower --learning-rate, or --compute fp32"
    )
