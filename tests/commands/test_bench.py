"""Bench: its figures fit together, and only methods that the base takes are measured; how fast, no test says."""

import json
from pathlib import Path

import pytest

from lorafit.cli import main
from tests.oracles.tiny_gguf import write_tiny_llama

SHAPE = {"layers": 1, "hidden": 512, "intermediate": 512, "context": 128, "vocab": 320}
# The weights of one layer: q and o, k and v of half the heads, and gate, up, down.
DECODER, HEAD = 2 * 512**2 + 2 * 512 * 256 + 3 * 512**2, 320 * 512


@pytest.mark.parametrize(("packing", "methods"), [("Q4_1", ["lora", "qalora"]), ("Q8_0", ["lora"])])
def test_the_share_of_the_limit_follows_from_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: str, methods: list[str]
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", format=packing, **SHAPE).path  # type: ignore[arg-type]
    assert main(["bench", str(path), "--rounds", "1", "--batch-size", "2", "--length", "9", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert list(measured["methods"]) == methods
    assert measured["unpacking_seconds_per_million_weights"] > 0
    for step in measured["methods"].values():
        # Of each 9 tokens 3 are trained; every weight is used twice for a token, at 2 FLOP.
        flops = 4 * (DECODER * 18 + HEAD * 6)
        limit = flops / measured["matrix_flops_per_second"]
        assert step["share_of_limit"] == pytest.approx(limit / step["step_seconds"], rel=1e-12)
        assert step["tokens_per_second"] == pytest.approx(18 / step["step_seconds"], rel=1e-12)


def test_rows_longer_than_the_context_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, "--length", "129"]) == 2
    assert "--length is 129, but the model's context is 128" in capsys.readouterr().err


def test_a_narrow_model_is_measured_with_the_rank_that_it_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {**SHAPE, "hidden": 128, "intermediate": 256}
    path = write_tiny_llama(tmp_path / "tiny.gguf", format="Q4_1", **shape).path  # type: ignore[arg-type]
    assert main(["bench", str(path), "--rounds", "1", "--batch-size", "1", "--length", "6", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["rank"] == 128 // 32  # blocks in a row
    assert list(measured["methods"]) == ["lora", "qalora"]
