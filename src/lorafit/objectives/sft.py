"""Supervised fine-tuning: the cross-entropy of the answers' tokens.

The vocabulary projection is the largest product of a small model and its result the largest tensor, so it is computed
only at the places whose next token is a target, in chunks, and never kept: each chunk's gradient with respect to its
hidden states is computed at once, in the forward pass, while its logits are at hand. What the backward pass then needs
is one tensor of the size of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorafit.data.packing import Batch
from lorafit.kernels import step
from lorafit.models.logits import finish_logits

CHUNK = 256  # places at a time: 256 rows of logits over 50,000 tokens are 25 MB in bfloat16


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the head gets to see at the places that predict a target: [N, dim].

    The model must be inside ``document_attention``.
    """
    output = model.get_decoder()(
        input_ids=batch.tokens.unsqueeze(0),
        position_ids=batch.positions.unsqueeze(0),
        use_cache=False,
        document_lengths=batch.lengths,
    )
    return output.last_hidden_state[0, batch.predictors]


def sft_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of a batch's targets, a scalar in float32 that can be differentiated.

    The sum and not the mean, so that a step of several passes divides by the number of all its targets.
    """
    batch = batch.to(model.device)
    head = model.get_output_embeddings()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(hidden_states(model, batch), batch.targets, partial(_logits, model), *trained)


@torch.no_grad()
def score(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per target: negative log-likelihood [N] float32, and whether the target was the most likely token [N] bool."""
    batch = batch.to(model.device)
    losses, hits = [], []
    for hidden, targets in _chunks(hidden_states(model, batch), batch.targets):
        logits = _logits(model, hidden).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(-1) == targets)
    return torch.cat(losses), torch.cat(hits)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return finish_logits(model, model.get_output_embeddings()(hidden))


def _chunks(hidden: Tensor, targets: Tensor) -> Any:
    return zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)


def _with_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets, and softmax minus one-hot, its gradient; may overwrite the logits."""
    if step.serves(logits, logits.shape[1]) and logits.is_contiguous():
        return step.cross_entropy_(logits, targets), logits
    buffer = logits.log_softmax(-1, dtype=torch.float32)
    places = torch.arange(len(targets), device=targets.device), targets
    losses = -buffer[places]
    buffer.exp_()[places] -= 1.0
    return losses, buffer.to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Loss of (hidden states [N, dim], targets [N], their way to logits, the head's trained parameters)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], *trained: nn.Parameter
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden: list[Tensor] = []
        by_parameter = [torch.zeros_like(parameter) for parameter in trained]
        for chunk, wanted in _chunks(hidden.detach(), targets):
            with torch.enable_grad():
                logits = logits_of(chunk.requires_grad_())
            losses, grad = _with_gradient(logits.detach(), wanted)
            total += losses.sum()
            of_hidden, *of_parameters = torch.autograd.grad(logits, [chunk, *trained], grad)
            by_hidden.append(of_hidden)
            for sum_, of_parameter in zip(by_parameter, of_parameters, strict=True):
                sum_ += of_parameter
            del logits, grad  # or the next chunk's would be computed beside them
        ctx.save_for_backward(torch.cat(by_hidden), *by_parameter)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        by_hidden, *by_parameter = ctx.saved_tensors
        # The scale stays in float32: a product with a scalar rounds once, whatever the type of the other factor.
        return by_hidden * scale, None, None, *(grad * scale for grad in by_parameter)
