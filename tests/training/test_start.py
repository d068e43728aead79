"""Runs that go on training an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lorafit
from lorafit.adapters import read_record
from lorafit.config import TrainConfig
from lorafit.data.chat import encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import read_examples
from lorafit.errors import ConfigError, LorafitWarning
from lorafit.evaluation.loss import evaluate
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama
from tests.training.rows import write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*only the shapes"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start")
    write_rows(path / "rows.jsonl", 40)
    write_rows(path / "held.jsonl", 8, first=100)
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> TinyLlama:
    return write_tiny_llama(folder / "tiny.gguf", context=128)


@pytest.fixture(scope="module")
def of_peft(folder: Path, tiny: TinyLlama) -> Path:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"use_dora": True, "rank_pattern": {"q_proj": 2}, "trainable_token_indices": [41, 60]}
    peft = get_peft_model(tiny.dense(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **settings))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    peft.save_pretrained(folder / "peft")
    return folder / "peft"


def config(folder: Path, output: str, **settings: Any) -> TrainConfig:
    common = {"eval_data": str(folder / "held.jsonl"), "batch_size": 4, "samples": 0, "compute": "fp32"}
    return TrainConfig(
        str(folder / "tiny.gguf"), str(folder / "rows.jsonl"), output=str(folder / output), **{**common, **settings}
    )


def test_a_run_goes_on_from_an_adapter_of_peft(folder: Path, tiny: TinyLlama, of_peft: Path) -> None:
    with pytest.warns(LorafitWarning, match="only the shapes"):
        model, tokenizer = lorafit.load(tiny.path, adapter=of_peft, compute="fp32")
    documents = encode_all(read_examples(folder / "held.jsonl"), tokenizer)
    expected = evaluate(model, split_passes(documents, 2048))
    with pytest.warns(LorafitWarning, match="only the shapes"):
        summary = lorafit.train(config(folder, "run", adapter=str(of_peft), steps=6, checkpoint_every=3))
    assert summary.eval_started == expected
    assert summary.eval_before is not None
    assert summary.eval_after is not None
    assert summary.eval_after.loss < expected.loss - 0.1
    assert abs(summary.eval_before.loss - expected.loss) > 0.02
    assert (summary.method, summary.adapter) == ("lora", str(of_peft))
    assert summary.coverage.whole["lm_head"] == "trained in the rows of 2 tokens, those of the embedding"
    record, start = read_record(folder / "run" / "adapter"), read_record(of_peft)
    assert record.config == start.config
    PeftModel.from_pretrained(tiny.dense(), folder / "run" / "adapter")
    text = (folder / "run" / "report.md").read_text()
    assert "| adapter at the start |" in text
    assert f"--adapter {of_peft}" in text
    # Resumed, it gives the same bits.
    other = config(folder, "resumed", adapter=str(of_peft), steps=6, checkpoint_every=3)
    interrupted_after(other, 3)
    lorafit.train(other, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "resumed/adapter" / name).read_bytes() == (folder / "run/adapter" / name).read_bytes()


def interrupted_after(config: TrainConfig, steps: int) -> None:
    from lorafit.training.run import Run

    run = Run.prepare(config, resume=False, say=lambda text: None)
    run.begin()
    for step in run.steps():
        if step.step == steps:
            return


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_a_run_goes_on_from_another_run(folder: Path, tiny: TinyLlama, method: Any) -> None:
    first = lorafit.train(config(folder, f"{method}-1", method=method, rank=2, targets="q_proj,up_proj", steps=4))
    second = lorafit.train(config(folder, f"{method}-2", adapter=first.output, steps=2, learning_rate=1e-5))
    assert second.eval_started == first.eval_after
    assert read_record(Path(second.output) / "adapter").config == read_record(Path(first.output) / "adapter").config
    one, two = (load_file(Path(run.output) / "adapter/adapter_model.safetensors") for run in (first, second))
    moved = max(float((one[key] - two[key]).abs().max()) for key in one)
    assert 0 < moved < 1e-4  # two steps of at most 1e-5 each
    settings = json.loads((Path(second.output) / "summary.json").read_text())
    assert settings["adapter"] == first.output
    with pytest.raises(ConfigError, match=r"--overwrite would remove .*, which this run reads"):
        lorafit.train(config(folder, f"{method}-2", adapter=second.output, steps=2, overwrite=True))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rank": 8}, "--rank 8: the adapter in .* has 4, and keeps it; leave it out"),
        ({"method": "qalora"}, "--method qalora: the adapter in .* has lora"),
        ({"targets": "o_proj"}, "--targets o_proj: the adapter in .* has q_proj,v_proj"),
        ({"scaling": "rslora"}, "--scaling rslora"),
        ({"dropout": 0.1}, "--dropout 0.1"),
        ({"frozen_tensors": "lora"}, "--frozen-tensors lora"),
        ({"quantize": "nf4"}, "quantised already"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(
    folder: Path, of_peft: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(lorafit.errors.LorafitError, match=complaint):
        lorafit.train(config(folder, "never", adapter=str(of_peft), steps=2, **settings))
    assert not (folder / "never").exists()


def test_an_adapter_that_changed_meanwhile_is_noticed(folder: Path, tiny: TinyLlama) -> None:
    first = lorafit.train(config(folder, "changing", method="lora", rank=2, steps=2))
    other = config(folder, "going-on", adapter=first.output, steps=4, checkpoint_every=2)
    interrupted_after(other, 2)
    lorafit.train(config(folder, "changing", method="lora", rank=2, steps=3, overwrite=True))
    with pytest.raises(ConfigError, match="its adapter changed since it began"):
        lorafit.train(other, resume=True)
