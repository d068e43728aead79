"""What people read: figures that are those of the run, and a command that trains it again."""

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from lorafit.cli import app
from lorafit.config import TrainConfig
from lorafit.evaluation.loss import Metrics
from lorafit.modules import Coverage
from lorafit.modules.size import Size
from lorafit.training import report
from lorafit.training.level import ChosenLevel
from lorafit.training.summary import Sample, Summary


def summary(**changes: object) -> Summary:
    frozen = {f"layers.{i}.odd": "Q8_0 has no block offsets" for i in range(5)} | {"head": "output head"}
    values = {
        "output": "runs/x", "model": "models/my model.gguf", "base_sha256": "abc123", "licence": "apache-2.0",
        "method": "qalora", "trainable_parameters": 1234, "total_parameters": 56789, "steps": 7, "tokens": 9000,
        "trained_tokens": 3000, "seconds": 4.5, "peak_rss_bytes": 2_340_000_000,
        "memory": ChosenLevel("low", True, 900, {"high": 9, "low": 5, "lowest": 2}, 8, "5 B fit"),
        "compute": "bfloat16",
        "eval_before": Metrics(2.5, math.exp(2.5), 0.25, 400), "eval_after": Metrics(1.25, math.exp(1.25), 0.5, 400),
        "size": Size(12_345_678, 5.678, 4.127), "quantize": None, "kept": {},
        "second_quantization": None,
        "coverage": Coverage("qalora", {"layers.0.q": 1000, "layers.1.q": 234}, frozen, {}, 56789),
        "promotion": None, "samples": [Sample("Q | <b>?", "the reference", "<|im_start|>base\nsays", "tuned says")],
    }  # fmt: skip
    return Summary(**{**values, **changes})  # type: ignore[arg-type]


def test_the_report_has_the_figures(tmp_path: Path) -> None:
    config = TrainConfig("models/my model.gguf", "d.jsonl", steps=7)
    report.write_report(tmp_path / "report.md", summary(), config)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "# my model.gguf, tuned with qalora",
        "| base | 2.5000 | 12.18 | 25.0% |",
        "| tuned | 1.2500 | 3.49 | 50.0% |",
        "1,234 parameters in 2 layers are trained.",
        "Left frozen: `layers.0.odd`, `layers.1.odd`, `layers.2.odd` and 2 more: Q8_0 has no block offsets.",
        "- 7 steps, 9,000 tokens (3,000 of them trained), 4 s, 2,000 tokens/s in bfloat16",
        "- peak resident memory 2.34 GB; --memory low: 5 B fit",
        "- 12.3 MB, 5.678 bits per parameter; 4.127 in the quantised tensors",
        # Two lines of one answer, whose tag Markdown would swallow.
        "> \\<|im_start|>base\n> says",
        "> tuned says",
        "> the reference",
    ):
        assert line in text, line


def test_a_base_that_was_quantised_says_how(tmp_path: Path) -> None:
    kept = {"layers.0.odd": "its rows are odd"}
    quantized = summary(quantize="nf4", kept=kept, second_quantization="tiny.gguf (Q4_1)")
    report.write_report(tmp_path / "report.md", quantized, TrainConfig("models/m", "d.jsonl", quantize="nf4"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "- linear layers quantised to nf4 while they were loaded",
        "- a second quantisation: these weights were unpacked from tiny.gguf (Q4_1)",
        "- left as they were: `layers.0.odd`: its rows are odd",
        "lorafit train models/m d.jsonl --quantize nf4",
    ):
        assert line in text, line
    report.write_model_card(tmp_path / "README.md", quantized, TrainConfig("models/m", "d.jsonl", quantize="nf4"))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| quantised to | nf4, while it is loaded |" in card
    assert "lorafit merge" not in card, "there is no file to merge into"


def test_a_run_that_measured_nothing_says_so(tmp_path: Path) -> None:
    nothing = summary(eval_before=None, eval_after=None, samples=[], peak_rss_bytes=None)
    report.write_report(tmp_path / "report.md", nothing, TrainConfig("m.gguf", "d.jsonl", no_eval=True))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Nothing was held out, so nothing was measured." in text
    assert "Samples" not in text
    assert "memory not measured" in text
    assert nothing.eval_loss_before is nothing.eval_loss_after is None


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig("m.gguf", "d.jsonl"),
        TrainConfig(
            "my model.gguf", "it's.jsonl", steps=3, learning_rate=2.6e-3, no_eval=True, targets="q_proj,v_proj"
        ),
        TrainConfig("m", "d", method="lora", targets=r".*\.(q|v)_proj", scaling="rslora", truncate=True, max_length=9),
    ],
)
def test_the_command_line_is_the_configuration(config: TrainConfig) -> None:
    """The parser is the oracle: what it makes of the words is the configuration that the words came from."""
    line = report.command_line(config)
    assert line.startswith("lorafit train ")
    _, bound, _ = app.parse_args(line.removeprefix("lorafit "))
    assert bound.arguments["config"] == config


def test_the_model_card_names_base_hash_licence_and_command(tmp_path: Path) -> None:
    config = TrainConfig("models/my model.gguf", "d.jsonl", method="qalora", steps=7)
    for method in ("qalora", "lora"):
        report.write_model_card(tmp_path / "README.md", summary(method=method), config)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text.startswith("---\nlibrary_name: peft\n")
        for part in ("models/my model.gguf", "abc123", "apache-2.0", report.command_line(config), "1,234 parameters"):
            assert part in text, part
        assert ("qalora_offsets.safetensors" in text) == (method == "qalora")


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_the_figure_shows_what_there_is(tmp_path: Path, steps: int) -> None:
    records: list[dict[str, float]] = [{"step": 0, "eval_loss": 3.0}]
    records += [{"step": step, "loss": 3.0 / step} for step in range(1, steps + 1)]
    seen = {}
    for name, shown in (("both", records), ("training", records[1:])):
        report.draw_loss(tmp_path / name, shown)
        pixels = imread(tmp_path / name, format="png")[..., :3]
        # Blue is the training loss, orange the held-out loss; grey (red = green = blue) is everything else.
        red, blue = pixels[..., 0], pixels[..., 2]
        seen[name] = bool((blue - red > 0.3).any()), bool((red - blue > 0.3).any())
    assert seen == {"both": (True, True), "training": (True, False)}


def test_smoothing_follows_the_losses_without_a_bias() -> None:
    assert report.smooth([5.0] * 100) == pytest.approx([5.0] * 100)
    assert report.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    # Over 60 steps the weight of the past is 2/3, so the second value is (1·2/3 + 4)/(2/3 + 1) of 1 and 4.
    assert report.smooth([1.0, 4.0] + [0.0] * 58)[:2] == pytest.approx([1.0, (1 * 2 / 3 + 4) / (2 / 3 + 1)])
