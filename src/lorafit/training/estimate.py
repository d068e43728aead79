"""What a run will cost, from one of its steps: the dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.modules import Coverage
from lorafit.modules.size import Size
from lorafit.training.level import ChosenLevel
from lorafit.training.loop import Step, Trainer, schedule_of
from lorafit.training.memory import peak_rss_bytes


@dataclass(frozen=True)
class Estimate:
    """What a dry run measured, and what it means for the whole run.

    Attributes:
        steps: Steps of the run.
        tokens: Tokens that the run would put through the model.
        step_tokens: Tokens of the measured step, the longest of the run.
        step_seconds: Its time.
        tokens_per_second: Its rate.
        total_seconds: Time of all steps at that rate.
        peak_rss_bytes: Peak resident memory up to the end of that step; None where it cannot be measured.
        memory: What steps would keep for their backward passes, and why.
        size: What the weights of the base take.
        coverage: Which layers would be trained.
    """

    steps: int
    tokens: int
    step_tokens: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float
    peak_rss_bytes: int | None
    memory: ChosenLevel
    size: Size
    coverage: Coverage

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "coverage": self.coverage.as_dict()}


def estimate(
    trainer: Trainer, documents: Sequence[Document], memory: ChosenLevel, size: Size, coverage: Coverage
) -> Estimate:
    """Measure the longest step of a run, after its first one for warm-up. Both move the adapter.

    Raises:
        TrainingError: As in training.
    """
    config = trainer.config
    assert config.steps is not None
    schedule = schedule_of(documents, config)
    lengths = [schedule.tokens(step) for step in range(config.steps)]

    def take(step: int) -> Step:
        return trainer.step(split_passes([documents[row] for row in schedule.rows(step)], config.pass_tokens))

    take(0)
    measured = take(lengths.index(max(lengths)))
    rate = measured.tokens / measured.seconds
    return Estimate(
        steps=config.steps,
        tokens=sum(lengths),
        step_tokens=measured.tokens,
        step_seconds=measured.seconds,
        tokens_per_second=rate,
        total_seconds=sum(lengths) / rate,
        peak_rss_bytes=peak_rss_bytes(),
        memory=memory,
        size=size,
        coverage=coverage,
    )
