"""Files as they are in the wild, of several formats: trained, stopped and gone on with, loaded, evaluated, merged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafit.cli import main
from lorafit.commands.console import Console
from lorafit.commands.evaluate import evaluate
from lorafit.commands.merge import merge
from lorafit.commands.train import train
from lorafit.config import TrainConfig
from lorafit.data.chat import encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import read_examples
from lorafit.evaluation.loss import evaluate as loss_of
from lorafit.merging.certificate import HeldOut
from lorafit.models.load import load, load_base
from lorafit.training.run import Run
from tests.merging.test_promotion import MIXED
from tests.oracles.tiny_gguf import write_tiny_llama
from tests.training.rows import write_rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As Q4_K_M has it: Q4_K, Q5_K, Q6_K, Q5_0, Q8_0 and Q4_1."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    write_tiny_llama(path, hidden=256, intermediate=256, context=128, format="Q4_K", formats=MIXED)  # type: ignore[arg-type]
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


@pytest.fixture(scope="module")
def trained(mixed: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("runs") / "run")
    words = ["train", mixed, data, "--output", output, "--rank", "4", "--steps", "12", "--batch-size", "4"]
    assert main([*words, "--compute", "fp32", "--samples", "1"]) == 0
    return output


def held_out_loss(model: torch.nn.Module, run: str) -> float:
    _, tokenizer = load(Path(run))
    documents = encode_all(read_examples(Path(run) / "heldout.jsonl"), tokenizer)
    return loss_of(model, split_passes(documents, 2048)).loss  # type: ignore[arg-type]


def test_the_run_reports_what_promotion_cost(trained: str, mixed: str) -> None:
    summary = json.loads((Path(trained) / "summary.json").read_text())
    assert summary["method"] == "qalora"
    cost = summary["promotion"]
    assert cost["tensors"] == {
        "promoted from Q4_K to Q4_1, rounded": 8,
        "promoted from Q5_0 to Q5_1, exact": 1,
        "promoted from Q5_K to Q5_1, rounded": 1,
    }
    weights = 256 * 256 * 7 + 128 * 256 * 2 + 256 * 256
    assert cost["file_bytes"] == sum(
        p["target_bytes"] - p["source_bytes"] for p in summary["coverage"]["promoted"].values()
    )
    assert cost["file_bytes"] == weights // 16  # half a bit for each weight
    assert cost["file_share"] == cost["file_bytes"] / Path(mixed).stat().st_size
    # Measured anew: the base as in the file, and as a run that has learnt nothing yet.
    base = held_out_loss(load_base(mixed, compute="fp32").model, trained)
    assert summary["eval_loss_before"] == cost["loss_in_file"] == base
    assert cost["loss_promoted"] != base
    assert cost["loss_promoted"] == pytest.approx(base, abs=2e-3)
    assert summary["eval_loss_after"] < base - 0.1
    report = (Path(trained) / "report.md").read_text()
    for text in (
        "- 8 promoted from Q4_K to Q4_1, rounded",
        f"- the merged file is {cost['file_bytes']:,} bytes larger than the base ({cost['file_share']:.1%}); ",
        f"{base:.6f} as in its file, {cost['loss_promoted']:.6f} promoted",
        "Left frozen: `model.layers.0.mlp.down_proj`, `model.layers.1.mlp.down_proj`: Q6_K has no block offsets.",
        "Q8_0 has no block offsets",
    ):
        assert text in report, text


def test_the_coverage_table_tells_the_fate_of_each_tensor(
    mixed: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", mixed, data, "--rank", "4", "--steps", "2", "--batch-size", "4", "--dry-run"]
    assert main([*words, "--frozen-tensors", "lora"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "Q4_K 2 trained, promoted from Q4_K to Q4_1, rounded",
        "Q5_0 1 trained, promoted from Q5_0 to Q5_1, exact",
        "Q4_1 1 trained 544",
        "Q6_K 2 trained by plain LoRA: Q6_K has no block offsets",
        "Promotion gives 10 tensors block offsets: the merged file will be",
    ):
        assert text in out, text


def test_exact_promotion_is_measured_and_changes_nothing(data: str, tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "q4_0.gguf", context=128, format="Q4_0").path)
    config = TrainConfig(model, data, output=str(tmp_path / "run"), rank=2, steps=1, batch_size=2, samples=0)
    cost = train(config).promotion
    assert cost is not None
    assert cost.loss_in_file == cost.loss_promoted
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["promoted_loss"] for record in records if "promoted_loss" in record] == [cost.loss_promoted]


@pytest.mark.parametrize("frozen_tensors", ["frozen", "lora"])
def test_a_run_goes_on_to_the_same_bits(mixed: str, data: str, tmp_path: Path, frozen_tensors: str) -> None:
    whole = TrainConfig(
        mixed, data, output=str(tmp_path / "whole"), method="qalora", rank=2, steps=4, batch_size=4, samples=0,
        checkpoint_every=2, frozen_tensors=frozen_tensors,  # type: ignore[arg-type]
    )  # fmt: skip
    summary = train(whole)
    part = replace(whole, output=str(tmp_path / "part"))
    run = Run.prepare(part, resume=False, say=Console(quiet=True).print)
    run.begin()
    for step in run.steps():
        if step.step == 2:
            break
    again = train(part, resume=True)
    for name in ("adapter_model.safetensors", "qalora_offsets.safetensors"):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "part/adapter" / name).read_bytes()
    assert again.promotion == summary.promotion
    assert again.eval_after == summary.eval_after


def test_loaded_and_evaluated_it_is_the_trained_model(trained: str, mixed: str) -> None:
    summary = json.loads((Path(trained) / "summary.json").read_text())
    model, _ = load(trained, compute="fp32")
    assert held_out_loss(model, trained) == summary["eval_loss_after"]
    found = evaluate(trained, f"{trained}/heldout.jsonl")  # in this machine's own arithmetic
    assert found["base"].loss == held_out_loss(load_base(mixed).model, trained)
    assert found["tuned"].loss == held_out_loss(load(trained)[0], trained)


def test_it_generates_and_merges_to_what_it_is(
    trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", trained, "What did he leave?", "--max-tokens", "4"]) == 0
    output = str(tmp_path / "tuned.gguf")
    assert main(["merge", trained, output, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out[captured.out.index('{\n  "lorafit"') :])
    assert document["weights"]["promoted"] == {"Q4_K to Q4_1": 8, "Q5_K to Q5_1": 1, "Q5_0 to Q5_1": 1}
    grown = document["merged"]["size"] - document["base"]["size"]
    assert grown == json.loads((Path(trained) / "summary.json").read_text())["promotion"]["file_bytes"]
    for text in ("promoted  ", "8 from Q4_K to Q4_1", f"the size changes by +{grown:,} (+", "equal to the last bit"):
        assert text in captured.err, text
    assert held_out_loss(load_base(output, compute="fp32").model, trained) == document["held_out"]["run_loss"]


def test_plain_lora_beside_is_trained_and_merged_by_rounding(
    mixed: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(tmp_path / "run"), str(tmp_path / "tuned.gguf")
    words = [
        "train",
        mixed,
        data,
        "--output",
        run,
        "--rank",
        "2",
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--samples",
        "0",
    ]
    assert main([*words, "--frozen-tensors", "lora"]) == 0
    assert f"lorafit merge {run} {run}.gguf --requantize q8_0" in capsys.readouterr().out.replace("\n", " ")
    assert main(["merge", run, output]) == 2
    assert "--requantize" in capsys.readouterr().err
    assert not Path(output).exists()
    assert main(["merge", run, output, "--requantize", "q8_0"]) == 0
    text = capsys.readouterr().out
    assert "not exact" in text
    assert "2 from Q6_K to Q8_0, 1 from Q8_0 to Q8_0: update added, rounded anew" in " ".join(text.split())
    certificate = json.loads(Path(f"{output}.certificate.json").read_text())
    assert certificate["requantized"]["exact"] is False
    losses = certificate["held_out"]
    assert losses["merged_loss"] != losses["run_loss"]
    assert losses["merged_loss"] == pytest.approx(losses["run_loss"], abs=0.05)
    kept = merge(run, output, requantize="keep", overwrite=True).requantized
    assert kept is not None
    assert kept.formats == {"Q6_K to Q6_K": 2, "Q8_0 to Q8_0": 1}
    assert merge(run, output, requantize="f16", overwrite=True).requantized is not None
    assert isinstance(merge(run, output, requantize="bf16", overwrite=True).held_out, HeldOut)
