"""One training step for every objective and method.

A step is some rows, split into passes that fit the memory budget. Each pass adds its summed loss, divided by the number
of targets of the *whole* step, so that the gradient is that of the mean over all trained tokens however the rows were
split. The loss function is an argument; the loop knows nothing of methods.

Dropout, like the choice of rows, is a pure function of seed and step: the generator is seeded anew for each step. So
neither an evaluation in between nor a step that failed half-way changes what a run computes, and a resumed run has no
random state to restore.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.config import TrainConfig
from lorafit.data.chat import Document
from lorafit.data.packing import Batch, group_passes, split_passes
from lorafit.data.schedule import Schedule
from lorafit.models.attention import document_attention
from lorafit.models.fuse import lay_weights_together
from lorafit.training import optim, proof
from lorafit.training.allocator import keep_freed_memory
from lorafit.training.memory import keep_activations

Loss = Callable[[PreTrainedModel, Batch], Tensor]


@dataclass(frozen=True)
class Step:
    """What happened in a step.

    Attributes:
        step: Its number, from 1.
        loss: Mean over the step's targets, before the update.
        learning_rate: The rate of the update.
        grad_norm: Norm of the gradient before clipping.
        tokens: Tokens that went through the model.
        trained_tokens: Targets.
        seconds: How long it took.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float


class Trainer:
    """A model, its optimiser, and the number of steps done.

    Args:
        model: A model with adapters.
        loss: Summed loss of a batch, see ``lorafit.objectives``.
        config: Settings; ``learning_rate``, ``steps`` and the size of a step must be resolved. What ``auto`` memory
            means is for others to say; here it keeps everything.
    """

    def __init__(self, model: PreTrainedModel, loss: Loss, config: TrainConfig) -> None:
        keep_freed_memory()
        self.model = model
        self.loss = loss
        self.config = config
        lay_weights_together(model)
        keep_activations(model, "high" if config.memory == "auto" else config.memory)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optim.make_optimizer(self.parameters, config.weight_decay)
        self.done = 0

    def steps(self, documents: Sequence[Document]) -> Iterator[Step]:
        """Train until all steps are done, yielding after each."""
        config = self.config
        assert config.steps is not None
        schedule = schedule_of(documents, config)
        while self.done < config.steps:
            rows = schedule.rows(self.done)
            yield self.step(split_passes([documents[row] for row in rows], config.pass_tokens))

    def step(self, batches: Sequence[Batch]) -> Step:
        """One update from the rows in ``batches``.

        Raises:
            TrainingError: The loss or the gradient is not finite, or an adapter got no gradient in the first step.
        """
        config, number = self.config, self.done + 1
        assert config.steps is not None and config.learning_rate is not None
        started = time.perf_counter()
        self.model.train()
        torch.manual_seed(_step_seed(config.seed, number))
        # Here and not behind the update, so that a step that failed leaves nothing to the next one.
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batches)
        proof.check_finite(loss, "loss", number, batches)
        if self.done == 0:
            proof.check_first_gradients(self.model)
        norm = float(optim.clip_gradients(self.parameters, config.max_grad_norm))
        proof.check_finite(norm, "gradient norm", number, batches)
        rate = optim.learning_rate_at(
            self.done, config.steps, peak=config.learning_rate, warmup=config.warmup, decay=config.decay
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done = number
        return Step(
            step=number,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(batch.tokens) for batch in batches),
            trained_tokens=sum(len(batch.targets) for batch in batches),
            seconds=time.perf_counter() - started,
        )

    def _backward(self, batches: Sequence[Batch]) -> float:
        targets = sum(len(batch.targets) for batch in batches)
        total = torch.zeros((), dtype=torch.float64)
        with document_attention(self.model):
            for batch in batches:
                loss = self.loss(self.model, batch) / targets
                loss.backward()
                total += loss.detach().double().cpu()
        return float(total)


def schedule_of(documents: Sequence[Document], config: TrainConfig) -> Schedule:
    """Which documents each step trains on."""
    lengths = [len(document.tokens) for document in documents]
    return Schedule(lengths, config.seed, batch_size=config.batch_size, tokens_per_step=config.tokens_per_step)


def longest_pass(documents: Sequence[Document], config: TrainConfig) -> list[Document]:
    """The documents of that pass of a run which has the most tokens."""
    assert config.steps is not None
    schedule = schedule_of(documents, config)
    steps = (schedule.rows(step) for step in range(config.steps))
    passes = (each for rows in steps for each in group_passes([documents[r] for r in rows], config.pass_tokens))
    return max(passes, key=lambda each: sum(len(document.tokens) for document in each))


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
