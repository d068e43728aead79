"""``lorafit export --format peft``: what PEFT computes from it is what the run computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorafit
from lorafit.adapters import read_record
from lorafit.cli import main
from lorafit.config import TrainConfig
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama
from tests.training.rows import write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*only the shapes"),
]

TOKENS = torch.tensor([list(range(40, 90))])
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    folder = tmp_path_factory.mktemp("export")
    write_rows(folder / "rows.jsonl", 40)
    return write_tiny_llama(folder / "tiny.gguf", context=128, formats={"ffn_down": "Q8_0"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"dora": True, "scaling": "rslora"}),
        ("qalora", {}),
        ("qalora", {"frozen_tensors": "lora"}),
    ],
)
def test_of_a_run(
    tiny: TinyLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Any, settings: dict[str, Any]
) -> None:
    rows, run, output = tiny.path.parent / "rows.jsonl", tmp_path / "run", tmp_path / "for-peft"
    common: dict[str, Any] = {"steps": 4, "batch_size": 4, "samples": 0, "rank": 2, "compute": "fp32"}
    lorafit.train(TrainConfig(str(tiny.path), str(rows), output=str(run), method=method, **common, **settings))
    assert main(["export", str(run), str(output), "--format", "peft", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {file.name for file in output.iterdir()} == FILES == found["files"].keys()
    ours = logits(lorafit.load(run, compute="fp32")[0])
    theirs = logits(PeftModel.from_pretrained(tiny.dense(), output))
    if method == "qalora":
        # Only the rounding of m' to half precision is between them. It moves logits by 1e-3 and 3e-3 in the mean
        # and the loss by 2e-4 and 9e-4, without and with LoRA; what was learnt moves logits by 0.05 at least.
        assert float((theirs - ours).abs().mean()) < 0.01
        assert len(found["differs_by"]) == 1
        assert "rounding of the trained offsets" in found["differs_by"][0]
        assert found["held_out"]["file_loss"] == pytest.approx(found["held_out"]["run_loss"], abs=2e-3)
    else:
        # float32 through two layers: measured 1e-5.
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        assert found["differs_by"] == []
        assert found["held_out"]["file_loss"] == found["held_out"]["run_loss"]
    assert float((ours - logits(tiny.dense())).abs().mean()) > 0.05
    assert found == json.loads(Path(f"{output}.certificate.json").read_text())
    record = read_record(output)
    assert record.config.method == "lora"
    assert record.base_sha256
    card = (output / "README.md").read_text()
    for part in (found["base_sha256"], f"--method {method}", "PeftModel.from_pretrained", "trained with lorafit by"):
        assert part in card


def test_an_older_adapter_becomes_one_of_today(tiny: TinyLlama, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"trainable_token_indices": [41], "init_lora_weights": False}
    peft = get_peft_model(tiny.dense(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
    peft.peft_config["default"].base_model_name_or_path = str(tiny.path)
    peft.save_pretrained(tmp_path / "old")
    state = {
        key: value
        for key, value in peft.state_dict().items()
        if "lora_" in key or "embed_tokens.token_adapter.trainable" in key
    }
    torch.save(state, tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    lorafit.export(str(tmp_path / "old"), str(tmp_path / "new"), format="peft")
    assert {file.name for file in (tmp_path / "new").iterdir()} == FILES
    again = PeftModel.from_pretrained(tiny.dense(), tmp_path / "new")
    torch.testing.assert_close(logits(again), logits(peft), rtol=0, atol=1e-4)
    assert "Trained by" not in (tmp_path / "new" / "README.md").read_text()


def test_what_is_refused(tiny: TinyLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert main(["export", *words, "--format", "peft"]) == 2
        return capsys.readouterr().err

    assert "is no run or adapter" in fails(str(tiny.path), str(tmp_path / "x"))
    assert "--dtype has no effect on --format peft" in fails(str(tiny.path), str(tmp_path / "x"), "--dtype", "fp16")
    model, _ = lorafit.load(tiny.path)
    lorafit.attach(model, lorafit.LoRA(rank=2))
    model.save_pretrained(tmp_path / "adapter")
    assert "holds the adapter that is exported" in fails(str(tmp_path / "adapter"), str(tmp_path), "--overwrite")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("dear")
    for more in ([], ["--overwrite"]):
        assert "exists" in fails(str(tmp_path / "adapter"), str(tmp_path / "taken"), *more) or more
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["letter.txt"]
