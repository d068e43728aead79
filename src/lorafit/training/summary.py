"""What a run came to: its figures, and answers of base and tuned model beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.data.readers import Example, Message
from lorafit.evaluation.generate import generate
from lorafit.evaluation.loss import Metrics
from lorafit.modules import Coverage, adapters_disabled
from lorafit.modules.size import Size
from lorafit.training.level import ChosenLevel

_ANSWER_TOKENS = 160  # enough to see how a model answers


@dataclass(frozen=True)
class Sample:
    """A held-out prompt answered by base and tuned model.

    Attributes:
        prompt: The last message before the answer.
        reference: The answer in the data.
        base: The base's answer.
        tuned: The tuned model's answer.
    """

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class PromotionCost:
    """What it cost to give blocks the offsets that QA-LoRA trains.

    Attributes:
        tensors: "promoted from FORMAT to FORMAT, exact or rounded" -> how many.
        file_bytes: By how many bytes the merged file will be larger than the base.
        file_share: The same as a share of the base.
        memory_bytes: Bytes of promoted blocks, which are held in memory.
        loss_in_file: Held-out loss of the base as it is in the file, before training; None without held-out rows.
        loss_promoted: The same with promoted weights.
    """

    tensors: dict[str, int]
    file_bytes: int
    file_share: float
    memory_bytes: int
    loss_in_file: float | None
    loss_promoted: float | None


def promotion_cost(
    coverage: Coverage, base: Path, in_file: Metrics | None, promoted: Metrics | None
) -> PromotionCost | None:
    """What promotion cost, if there was any.

    Args:
        coverage: What was attached.
        base: The base file.
        in_file: Metrics of the base as it is in the file.
        promoted: Metrics of the base with promoted weights.
    """
    if not coverage.promoted:
        return None
    return PromotionCost(
        tensors=dict(Counter(map(str, coverage.promoted.values()))),
        file_bytes=coverage.promotion_bytes,
        file_share=coverage.promotion_bytes / base.stat().st_size,
        memory_bytes=coverage.promoted_memory_bytes,
        loss_in_file=in_file.loss if in_file else None,
        loss_promoted=promoted.loss if promoted else None,
    )


@dataclass(frozen=True)
class Summary:
    """Figures of a run, as in ``summary.json``.

    Attributes:
        output: Directory of the run.
        model: The base as it was named.
        base_sha256: Its fingerprint.
        licence: Licence of the base, as its file says.
        method: ``lora``, ``qlora`` or ``qalora``.
        trainable_parameters: Parameters that were trained.
        total_parameters: Parameters of the base.
        steps: Optimiser steps.
        tokens: Tokens that went through the model in the steps.
        trained_tokens: Those of them that were predicted.
        seconds: Time in the steps, evaluations left out.
        peak_rss_bytes: Peak resident memory; None where it cannot be measured.
        memory: What steps kept for their backward passes, and why.
        compute: Arithmetic.
        eval_before: Metrics of the base on the held-out rows, if there are any.
        eval_after: Metrics of the tuned model.
        size: What the weights of the base took, in bytes and in bits per parameter.
        quantize: What its linear layers were quantised to while it was loaded, if they were.
        kept: Linear layers that this left as they were -> why.
        second_quantization: The quantised file whose weights were quantised a second time, if they were.
        coverage: Which layers were trained, and why the others were not.
        promotion: What it cost to give blocks offsets; None where none had to be given.
        samples: Held-out prompts answered by both.
        adapter: The adapter that the run started from, if it went on training one.
        eval_started: Metrics of that adapter.
    """

    output: str
    model: str
    base_sha256: str
    licence: str
    method: str
    trainable_parameters: int
    total_parameters: int
    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    peak_rss_bytes: int | None
    memory: ChosenLevel
    compute: str
    eval_before: Metrics | None
    eval_after: Metrics | None
    size: Size
    quantize: str | None
    kept: dict[str, str]
    second_quantization: str | None
    coverage: Coverage
    promotion: PromotionCost | None
    samples: list[Sample]
    adapter: str | None = None
    eval_started: Metrics | None = None

    @property
    def tokens_per_second(self) -> float:
        """Rate over all steps."""
        return self.tokens / self.seconds

    @property
    def eval_loss_before(self) -> float | None:
        """Held-out loss of the base."""
        return self.eval_before.loss if self.eval_before else None

    @property
    def eval_loss_after(self) -> float | None:
        """Held-out loss of the tuned model."""
        return self.eval_after.loss if self.eval_after else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "coverage": self.coverage.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "eval_loss_before": self.eval_loss_before,
            "eval_loss_after": self.eval_loss_after,
        }


def answer_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Sample]:
    """Let base and tuned model give the last answer of each example, greedily."""
    samples = []
    for example in examples:
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        prompt, reference = example.messages[:last], example.messages[last]["content"]
        with adapters_disabled(model):
            base = _answer(model, tokenizer, prompt)
        samples.append(Sample(prompt[-1]["content"], reference, base, _answer(model, tokenizer, prompt)))
    return samples


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    return "".join(generate(model, tokenizer, prompt, max_tokens=_ANSWER_TOKENS))
