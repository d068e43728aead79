"""How well a model predicts held-out answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from lorafit.data.packing import Batch
from lorafit.models.attention import document_attention
from lorafit.modules.dora import gains_held
from lorafit.modules.qalora import offsets_held
from lorafit.objectives.sft import score


@dataclass(frozen=True)
class Metrics:
    """Figures over all answer tokens of a data set.

    Attributes:
        loss: Mean negative log-likelihood per token, in nats.
        perplexity: e to the loss.
        token_accuracy: Share of tokens that the model thought most likely.
        tokens: How many tokens were predicted.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def evaluate(model: PreTrainedModel, batches: Sequence[Batch]) -> Metrics:
    """Score a model on batches, without dropout and without changing its state.

    The sum runs in float64 over the tokens in order, so that equal models give equal figures.
    """
    was_training = model.training
    model.eval()
    total, hits, count = 0.0, 0, 0
    try:
        with torch.no_grad(), document_attention(model), offsets_held(model), gains_held(model):
            for batch in batches:
                losses, correct = score(model, batch)
                total += float(losses.double().sum())
                hits += int(correct.sum())
                count += len(losses)
    finally:
        model.train(was_training)
    assert count, "there is nothing to score"
    loss = total / count
    return Metrics(loss, math.exp(min(loss, 700.0)), hits / count, count)
