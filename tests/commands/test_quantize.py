"""Training beside a base that is quantised while it is loaded: the main job of a checkpoint in full precision."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafit
from lorafit.adapters import read_record
from lorafit.cli import main
from lorafit.commands.console import Console
from lorafit.commands.evaluate import evaluate
from lorafit.commands.train import estimate, train
from lorafit.config import TrainConfig, read_settings
from lorafit.errors import AdapterError, ConfigError, MergeError, ModelError
from lorafit.models.load import load
from lorafit.modules import PackedLinear
from tests.models.test_bitsandbytes import quantized_here
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import write_tiny_llama
from tests.training.rows import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    write_tiny_directory(path / "dense", num_hidden_layers=1)
    write_tiny_llama(path / "tiny.gguf", layers=1, context=256)
    write_tiny_llama(path / "half.gguf", layers=1, context=256, format="F16", embedding_format="F16")
    write_rows(path / "rows.jsonl", 60)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(folder / "dense"), str(folder / "rows.jsonl"), output=str(tmp_path / "run"), method="qlora", rank=2,
        steps=8, batch_size=4, samples=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantize", "method", "blocks"),
    [
        ("nf4", "qlora", "NF4_DQ"), ("fp4", "qlora", "FP4_DQ"), ("q8_0", "qlora", "Q8_0"), ("nf4", "lora", "NF4_DQ"),
        ("q4_1", "qalora", "Q4_1"), ("q5_1", "qalora", "Q5_1"),
    ],
)  # fmt: skip
def test_it_learns_and_what_was_measured_is_what_was_saved(
    config: TrainConfig, quantize: str, method: str, blocks: str
) -> None:
    config = replace(config, quantize=quantize, method=method)
    summary = train(config)
    assert summary.eval_before is not None
    assert summary.eval_after is not None
    # A loss of ln(320) = 5.8 is that of guessing; the random base is worse, and a few steps undo half of that.
    assert summary.eval_after.loss < summary.eval_before.loss - 0.5
    assert set(summary.coverage.formats.values()) == {
        blocks,
        "bfloat16" if summary.compute == "bfloat16" else "float32",
    }
    assert summary.quantize == quantize
    assert read_settings(f"{config.output}/config.yaml")["quantize"] == quantize
    record = read_record(f"{config.output}/adapter")
    assert (record.quantize, record.config.method, record.base) == (quantize, method, config.model)
    # The base is quantised again, to the same bits, whenever the run is used.
    figures = evaluate(str(config.output), f"{config.output}/heldout.jsonl")
    assert figures["base"] == summary.eval_before
    assert figures["tuned"] == summary.eval_after


def test_the_way_to_ship_that_is_named_works(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, steps=1), console=Console())
    command = next(line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "  ship  " in line)
    assert main(shlex.split(command)[1:]) == 0
    assert Path(f"{config.output}-merged", "model.safetensors").is_file()


def test_qlora_implies_nf4_and_quantize_implies_a_method(config: TrainConfig) -> None:
    summary = train(config)
    assert (summary.quantize, summary.method) == ("nf4", "qlora")
    assert read_settings(f"{config.output}/config.yaml")["quantize"] == "nf4"
    for quantize, method in (("nf4", "qlora"), ("fp4", "qlora"), ("q8_0", "qlora"), ("q4_1", "qalora")):
        cost = estimate(replace(config, output=None, quantize=quantize, method=None))
        assert cost.coverage.method == method
    assert estimate(replace(config, output=None, method=None)).coverage.method == "lora"


def test_qlora_takes_a_packed_base_as_it_is(config: TrainConfig, folder: Path) -> None:
    cost = estimate(replace(config, output=None, model=str(folder / "tiny.gguf")))
    assert cost.coverage.method == "qlora"
    assert cost.size.quantized_bits_per_parameter is not None
    assert cost.size.quantized_bits_per_parameter > 4.9  # Q4_1's 5 and the embedding's 8.5, not NF4's 4.1
    cost = estimate(replace(config, output=None, model=str(folder / "half.gguf")))
    assert cost.coverage.formats["model.layers.0.mlp.up_proj"] == "NF4_DQ"


def test_what_bitsandbytes_quantised_is_trained_as_it_is(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    quantized_here(folder / "dense", tmp_path / "model", block=64, nested=True, kind="nf4")
    summary = train(replace(config, model=str(tmp_path / "model")))
    assert (summary.method, summary.quantize, summary.second_quantization) == ("qlora", None, None)
    assert set(summary.coverage.formats.values()) >= {"NF4_DQ"}
    figures = evaluate(str(config.output), f"{config.output}/heldout.jsonl")
    assert figures["base"] == summary.eval_before
    assert figures["tuned"] == summary.eval_after
    # Its blocks are bitsandbytes', as ours are, so that both bases are the same.
    assert train(replace(config, overwrite=True)).eval_before == summary.eval_before


def test_a_run_goes_on_beside_the_same_base(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, checkpoint_every=3)
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)

    class Stopping(Console):
        def print(self, text: str = "", *, style: str | None = None) -> None:
            if text.startswith("training 5/8"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, console=Stopping(quiet=True))
    assert main(["train", "--resume", str(config.output)]) == 0
    file = "adapter/adapter_model.safetensors"
    assert Path(f"{config.output}/{file}").read_bytes() != b""
    ours, theirs = (Path(f"{run.output}/{file}").read_bytes() for run in (config, whole))
    # The files name the same base, and hold the same weights.
    assert ours == theirs


def test_a_run_loads_with_its_base_quantised(config: TrainConfig) -> None:
    train(config)
    model, _ = lorafit.load(str(config.output))
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert {layer.packed.format_name for layer in layers} == {"NF4_DQ"}
    plain, _ = load(config.model)
    assert not any(isinstance(layer, PackedLinear) for layer in plain.modules())


def test_the_report_has_the_bits_and_what_was_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "odd", num_hidden_layers=1, intermediate_size=96)
    summary = train(replace(config, model=str(tmp_path / "odd")))
    document = json.loads(Path(f"{config.output}/summary.json").read_text())
    assert document["quantize"] == "nf4"
    assert document["kept"] == {"model.layers.0.mlp.down_proj": "its rows of 96 weights are not whole blocks of 64"}
    assert document["second_quantization"] is None
    bits = document["size"]["quantized_bits_per_parameter"]
    assert 4.127 < bits < 4.14
    report = Path(f"{config.output}/report.md").read_text()
    assert f"{bits:.3f} in the quantised tensors" in report
    assert "- linear layers quantised to nf4 while they were loaded" in report
    assert "`model.layers.0.mlp.down_proj`: its rows of 96 weights are not whole blocks of 64" in report
    assert "second" not in report
    assert "| quantised to | nf4, while it is loaded |" in Path(f"{config.output}/adapter/README.md").read_text()
    assert "model.layers.0.mlp.down_proj" in summary.coverage.wrapped, "dense layers are trained all the same"


def test_a_second_quantisation_is_labelled(
    config: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, run = str(tmp_path / "dense"), str(tmp_path / "run")
    assert main(["export", str(folder / "tiny.gguf"), dense, "--format", "safetensors"]) == 0
    words = ["train", dense, config.data, "--quantize", "nf4", "--rank", "2", "--steps", "2", "--samples", "0"]
    capsys.readouterr()
    assert main([*words, "--output", run]) == 0
    label = "a second quantisation: these weights were unpacked from tiny.gguf (Q4_1, Q8_0)"
    assert label in capsys.readouterr().out
    assert label in Path(f"{run}/report.md").read_text()
    assert json.loads(Path(f"{run}/summary.json").read_text())["second_quantization"] == "tiny.gguf (Q4_1, Q8_0)"
    assert main([*words[:3], *words[5:], "--output", f"{run}-plain"]) == 0
    assert "second quantisation" not in Path(f"{run}-plain/report.md").read_text(), (
        "trained as it is, nothing is rounded again"
    )
    assert main(["export", str(folder / "half.gguf"), f"{dense}-half", "--format", "safetensors"]) == 0
    words[1] = f"{dense}-half"
    assert main([*words, "--output", f"{run}-half"]) == 0
    assert "second quantisation" not in Path(f"{run}-half/report.md").read_text(), "F16 was no quantisation"


def test_quantising_the_exported_file_back_gives_its_blocks(folder: Path, tmp_path: Path) -> None:
    """Weights that lie on the grid of Q4_1 already are found there again by rounding and by the search alike."""
    dense = str(tmp_path / "dense")
    assert main(["export", str(folder / "tiny.gguf"), dense, "--format", "safetensors"]) == 0
    again, before = load(dense, quantize="q4_1", compute="fp32")[0], load(folder / "tiny.gguf", compute="fp32")[0]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        # One step of a half-precision offset at most, in the few blocks whose ends are not both taken.
        torch.testing.assert_close(again(ids).logits, before(ids).logits, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "kind", "complaint"),
    [
        ({"method": "qalora", "quantize": "nf4"}, ConfigError, "--quantize nf4 makes blocks without the offsets that"),
        ({"method": "qalora", "quantize": "q8_0"}, ConfigError, "use q4_1 or q5_1, or --method qlora"),
        ({"quantize": "q2_k"}, ConfigError, "--quantize is q2_k, but must be one of nf4, fp4, q4_1, q5_1, q8_0"),
        ({"model": "tiny.gguf", "quantize": "nf4"}, ModelError, "quantised already; .*lorafit export .* a second time"),
        ({"method": "qalora", "quantize": None}, AdapterError, "no target layer can take qalora"),
        ({"method": "qlora", "frozen_tensors": "lora"}, ConfigError, "--frozen-tensors lora has no effect"),
    ],
)
def test_what_has_no_effect_or_cannot_be(
    config: TrainConfig, folder: Path, settings: dict[str, str], kind: type[Exception], complaint: str
) -> None:
    if "model" in settings:
        settings = settings | {"model": str(folder / settings["model"])}
    with pytest.raises(kind, match=complaint):
        train(replace(config, **settings))
    assert not Path(str(config.output)).exists()


def test_a_quantisation_that_nobody_knows(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="quantize is 'q3', but must be one of nf4, fp4, q4_1, q5_1, q8_0"):
        load(config.model, quantize="q3")  # type: ignore[arg-type]
    train(replace(config, steps=1))
    path = Path(f"{config.output}/adapter/adapter_model.safetensors")
    content = path.read_bytes()
    assert content.count(b'\\"quantize\\": \\"nf4\\"') == 1
    path.write_bytes(content.replace(b'\\"nf4\\"', b'\\"nf5\\"'))
    with pytest.raises(AdapterError, match="its base was quantised to 'nf5', which is unknown"):
        load(str(config.output))


def test_no_file_has_the_blocks_of_such_a_run(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, method="qalora", quantize="q4_1", steps=1))
    with pytest.raises(MergeError, match=r"as it is after --quantize q4_1: there is no GGUF file of these blocks"):
        lorafit.merge(str(config.output), str(tmp_path / "out.gguf"))
