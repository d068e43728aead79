"""What a run leaves for people to read: a figure, a report, and the adapter's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafit.config import TrainConfig
from lorafit.containers.atomic import replacing, write_text
from lorafit.evaluation.loss import Metrics
from lorafit.modules import Coverage


@dataclass(frozen=True)
class Sample:
    """A held-out prompt answered by base and tuned model.

    Attributes:
        prompt: The last message of the user.
        reference: The answer in the data.
        base: The base's answer.
        tuned: The tuned model's answer.
    """

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Summary:
    """Figures of a run, as in ``summary.json``.

    Attributes:
        output: Directory of the run.
        model: The base as it was named.
        base_sha256: Its fingerprint.
        licence: Licence of the base, as its file says.
        method: ``lora`` or ``qalora``.
        trainable_parameters: Parameters that were trained.
        total_parameters: Parameters of the base.
        steps: Optimiser steps.
        tokens: Tokens that went through the model in training.
        trained_tokens: Those of them that were predicted.
        seconds: Time in training steps.
        tokens_per_second: tokens / seconds.
        peak_rss_bytes: Peak resident memory.
        compute: Arithmetic.
        eval_before: Metrics of the base on the held-out rows.
        eval_after: Metrics of the tuned model.
        coverage: Which layers were trained, and why the others were not.
        samples: Held-out prompts answered by both.
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
    tokens_per_second: float
    peak_rss_bytes: int | None
    compute: str
    eval_before: Metrics | None
    eval_after: Metrics | None
    coverage: Coverage
    samples: list[Sample] = field(default_factory=list)

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
            "eval_loss_before": self.eval_loss_before,
            "eval_loss_after": self.eval_loss_after,
        }


def draw_loss(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw training and held-out loss over the steps from the lines of ``metrics.jsonl``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#b9cbe4", linewidth=1, label="training, each step")
        axes.plot(steps, smooth(losses), color="#2f5d9b", linewidth=2, label="training, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o--", color="#c4572b", linewidth=1.5, label="held out")
        for step, loss in (held_out[0], held_out[-1]):
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def smooth(losses: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, without a bias towards zero at the start."""
    average, norm, result = 0.0, 0.0, []
    for loss in losses:
        average = weight * average + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result


def write_report(path: Path, summary: Summary, config: TrainConfig) -> None:
    """Write ``report.md``."""
    lines = [f"# {summary.model}, tuned with {summary.method}", "", *_result(summary), "![loss](loss.png)", ""]
    lines += ["## Coverage", "", *_coverage(summary.coverage), "", *_samples(summary.samples)]
    memory = f"{summary.peak_rss_bytes / 1e9:.2f} GB" if summary.peak_rss_bytes else "not measured on this system"
    lines += [
        "## Cost",
        "",
        f"- {summary.steps} steps, {summary.tokens:,} tokens ({summary.trained_tokens:,} of them trained), "
        f"{summary.seconds:.0f} s, {summary.tokens_per_second:,.0f} tokens/s in {summary.compute}",
        f"- peak resident memory {memory}",
        "",
        "## Settings",
        "",
        "`lorafit train --config config.yaml --overwrite` trains this again.",
        "",
        *_table(["setting", "value"], [(key, value) for key, value in asdict(config).items() if value is not None]),
        "",
    ]
    write_text(path, "\n".join(lines))


def write_model_card(path: Path, summary: Summary) -> None:
    """Write the adapter's ``README.md``."""
    size = f"{summary.trainable_parameters:,}"
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# Adapter for {summary.model}",
        "",
        f"Trained with lorafit, method {summary.method}: {size} parameters, {summary.steps} steps.",
        "",
        *_table(
            ["base", ""],
            [
                ("model", summary.model),
                ("SHA-256", summary.base_sha256),
                ("licence", summary.licence),
                ("command", "`lorafit train --config config.yaml` (in the run's directory)"),
            ],
        ),
        "",
        *_result(summary),
    ]
    if summary.method == "qalora":
        lines += [
            "A QA-LoRA adapter: it is stored as an ordinary LoRA that PEFT loads, and `lorafit merge` folds it into the "
            "block offsets of the quantised base, copying `qalora_offsets.safetensors`.",
            "",
        ]
    write_text(path, "\n".join(lines))


def _result(summary: Summary) -> list[str]:
    if summary.eval_before is None or summary.eval_after is None:
        return ["Nothing was held out, so nothing was measured.", ""]
    rows = [
        (name, f"{metrics.loss:.4f}", f"{metrics.perplexity:.2f}", f"{metrics.token_accuracy:.1%}")
        for name, metrics in (("base", summary.eval_before), ("tuned", summary.eval_after))
    ]
    table = _table(["held out", "loss", "perplexity", "token accuracy"], rows)
    return [*table, "", f"On {summary.eval_after.tokens:,} answer tokens that were not trained on.", ""]


def _coverage(coverage: Coverage) -> list[str]:
    lines = [f"{coverage.trainable_parameters:,} parameters in {len(coverage.wrapped)} layers are trained."]
    reasons: dict[str, list[str]] = {}
    for name, reason in coverage.frozen.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"Left frozen: {shown}: {reason}.")
    return lines


def _samples(samples: Sequence[Sample]) -> list[str]:
    lines = ["## Samples", ""] if samples else []
    for number, sample in enumerate(samples, 1):
        lines += [f"### {number}", ""]
        parts = {"prompt": sample.prompt, "base": sample.base, "tuned": sample.tuned, "in the data": sample.reference}
        for name, text in parts.items():
            quoted = "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])
            lines += [f"**{name}**", "", quoted, ""]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    body = [f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells]]
    return body
