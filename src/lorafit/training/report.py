"""What a run leaves for people to read: a figure, a report, and the adapter's model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorafit.config import TrainConfig
from lorafit.containers.atomic import replacing, write_text
from lorafit.modules import Coverage
from lorafit.modules.size import Size
from lorafit.training.summary import PromotionCost, Sample, Summary


def write(run: Path, summary: Summary, config: TrainConfig, records: Sequence[Mapping[str, Any]]) -> None:
    """Leave everything in the directory of a run; ``summary.json`` comes last, and says that the run is complete."""
    draw_loss(run / "loss.png", records)
    write_report(run / "report.md", summary, config)
    write_model_card(run / "adapter" / "README.md", summary, config)
    write_text(
        run / "summary.json", json.dumps(summary.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


_SMOOTHED_FROM = 40  # steps; fewer can be followed with the eye


def draw_loss(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw training and held-out loss over the steps from the lines of ``metrics.jsonl``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*training, strict=True)
    if len(steps) < _SMOOTHED_FROM:
        axes.plot(steps, losses, ".-", color="#2f5d9b", linewidth=2, label="training")
    else:
        axes.plot(steps, losses, color="#b9cbe4", linewidth=1, label="training, each step")
        axes.plot(steps, smooth(losses), color="#2f5d9b", linewidth=2, label="training, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        # A line between two points would tell of a course that nobody measured.
        axes.plot(steps, losses, "o--" if len(steps) > 2 else "o", color="#c4572b", linewidth=1.5, label="held out")
        for step, loss in (held_out[0], held_out[-1]):
            axes.annotate(
                f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 9), ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the steps, without a bias towards zero at the start."""
    weight = 1 - 1 / max(len(losses) / 20, 1)
    average, norm, result = 0.0, 0.0, []
    for loss in losses:
        average = weight * average + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result


def _title(summary: Summary) -> str:
    """What was tuned, in a few words."""
    return f"{Path(summary.model).name}, tuned with {summary.method}"


def command_line(config: TrainConfig) -> str:
    """The command that trains the same again: every setting that is not the default."""
    words = [config.model, config.data]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("model", "data", "output", "overwrite") or value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        words += [] if value is True else [str(value)]
    return shlex.join(["lorafit", "train", *words])


def write_report(path: Path, summary: Summary, config: TrainConfig) -> None:
    """Write ``report.md``."""
    lines = [f"# {_title(summary)}", "", *_result(summary), "![loss](loss.png)", ""]
    base = describe_base(summary.size, summary.quantize, summary.kept, summary.second_quantization)
    lines += ["## Base", "", *(f"- {line}" for line in base), ""]
    lines += ["## Coverage", "", *_coverage(summary.coverage), "", *_promotion(summary.promotion)]
    lines += _samples(summary.samples)
    memory = f"{summary.peak_rss_bytes / 1e9:.2f} GB" if summary.peak_rss_bytes else "not measured on this system"
    limit = f" of at most {config.tokens_per_step:,} tokens" if config.tokens_per_step else ""
    lines += [
        "## Cost",
        "",
        f"- {summary.steps} steps{limit}, {summary.tokens:,} tokens ({summary.trained_tokens:,} of them trained), "
        f"{summary.seconds:.0f} s, {summary.tokens_per_second:,.0f} tokens/s in {summary.compute}",
        f"- peak resident memory {memory}; --memory {summary.memory.level}: {summary.memory.reason}",
        "",
        "## Settings",
        "",
        "All of them are in `config.yaml`: `lorafit train --config config.yaml --output ANOTHER` trains this again, as "
        "does",
        "",
        "```",
        command_line(config),
        "```",
        "",
    ]
    write_text(path, "\n".join(lines))


def write_model_card(path: Path, summary: Summary, config: TrainConfig) -> None:
    """Write the adapter's ``README.md``."""
    size = f"{summary.trainable_parameters:,}"
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# Adapter: {_title(summary)}",
        "",
        f"{size} parameters, trained with lorafit in {summary.steps} steps:",
        "",
        "```",
        command_line(config),
        "```",
        "",
        *_table(
            ["base", ""],
            [
                ("model", summary.model),
                ("SHA-256", summary.base_sha256),
                ("licence", summary.licence),
                *([("adapter at the start", summary.adapter)] if summary.adapter else []),
                *([("quantised to", f"{summary.quantize}, while it is loaded")] if summary.quantize else []),
            ],
        ),
        "",
        *_result(summary),
    ]
    if summary.method == "qalora" and not summary.quantize:
        lines += [
            "A QA-LoRA adapter: it is stored as an ordinary LoRA, which PEFT loads, and `lorafit merge` folds it into "
            "the block offsets of the quantised base by copying `qalora_offsets.safetensors`.",
            "",
        ]
    write_text(path, "\n".join(lines))


def _result(summary: Summary) -> list[str]:
    if summary.eval_before is None or summary.eval_after is None:
        return ["Nothing was held out, so nothing was measured.", ""]
    rows = [
        (name, f"{metrics.loss:.4f}", f"{metrics.perplexity:.2f}", f"{metrics.token_accuracy:.1%}")
        for name, metrics in (
            ("base", summary.eval_before),
            ("adapter at the start", summary.eval_started),
            ("tuned", summary.eval_after),
        )
        if metrics
    ]
    table = _table(["held out", "loss", "perplexity", "token accuracy"], rows)
    return [*table, "", f"On {summary.eval_after.tokens:,} answer tokens of the rows in `heldout.jsonl`.", ""]


def describe_base(size: Size, quantize: str | None, kept: Mapping[str, str], second: str | None) -> list[str]:
    """How the weights of the base are held, a line for each fact."""
    lines = [f"{size.nbytes / 1e6:,.1f} MB, {size.bits_per_parameter:.3f} bits per parameter"]
    if size.quantized_bits_per_parameter is not None:
        lines[0] += f"; {size.quantized_bits_per_parameter:.3f} in the quantised tensors"
    if quantize:
        lines.append(f"linear layers quantised to {quantize} while they were loaded")
    if second:
        lines.append(f"a second quantisation: these weights were unpacked from {second}")
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"left as they were: {_few(names)}: {reason}" for reason, names in reasons.items()]


def _few(names: Sequence[str]) -> str:
    """The first of many names; all of them are in ``summary.json``."""
    return ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _coverage(coverage: Coverage) -> list[str]:
    lines = [f"{coverage.trainable_parameters:,} parameters in {len(coverage.wrapped)} layers are trained."]
    promoted = {name: str(promotion) for name, promotion in coverage.promoted.items()}
    beside, whole, frozen = coverage.beside, coverage.whole, coverage.frozen
    fates = {"Trained": promoted, "Trained by plain LoRA": beside, "Itself": whole, "Left frozen": frozen}
    reasons: dict[tuple[str, str], list[str]] = {}
    for fate, layers in fates.items():
        for name, reason in layers.items():
            reasons.setdefault((fate, reason), []).append(name)
    for (fate, reason), names in reasons.items():
        lines.append(f"{fate}: {_few(names)}: {reason}.")
    return lines


def _promotion(cost: PromotionCost | None) -> list[str]:
    if cost is None:
        return []
    loss = "nothing was held out, so its effect on the loss was not measured"
    if cost.loss_in_file is not None and cost.loss_promoted is not None:
        loss = (
            f"held-out loss of the base before training: {cost.loss_in_file:.6f} as in its file, "
            f"{cost.loss_promoted:.6f} promoted (a difference of {cost.loss_promoted - cost.loss_in_file:.2g})"
        )
    return [
        "## Promotion",
        "",
        "QA-LoRA trains block offsets, and these tensors' blocks had none:",
        "",
        *(f"- {count} {how}" for how, count in cost.tensors.items()),
        f"- the merged file is {cost.file_bytes:,} bytes larger than the base ({cost.file_share:.1%}); "
        f"{cost.memory_bytes:,} bytes of promoted blocks were held in memory",
        f"- {loss}",
        "",
    ]


def _samples(samples: Sequence[Sample]) -> list[str]:
    lines = ["## Samples", ""] if samples else []
    for number, sample in enumerate(samples, 1):
        lines += [f"### {number}", ""]
        parts = {"prompt": sample.prompt, "base": sample.base, "tuned": sample.tuned, "in the data": sample.reference}
        for name, text in parts.items():
            # Markdown shows no tags, such as those of a chat template, unless they are escaped.
            quoted = "\n".join(f"> {line}" for line in text.strip().replace("<", "\\<").splitlines() or [""])
            lines += [f"**{name}**", "", quoted, ""]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    body = [f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells]]
    return body
