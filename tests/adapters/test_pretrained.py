"""``save_pretrained`` of a model with an adapter writes what PEFT and lorafit load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lorafit
from lorafit.adapters import read_record
from lorafit.containers.atomic import fingerprint
from lorafit.errors import ConfigError
from tests.oracles.adapted import fill
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.tensor([list(range(40, 90))])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_of_a_packed_model(tiny: TinyLlama, tmp_path: Path) -> None:
    model, _ = lorafit.load(tiny.path, compute="fp32")
    theirs = type(model).save_pretrained
    lorafit.attach(model, lorafit.LoRA(rank=4, dora=True, targets="q_proj,down_proj"))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    record = read_record(tmp_path / "adapter")
    assert (record.base, record.base_sha256) == (str(tiny.path), fingerprint(tiny.path))
    # float32 through two layers: measured 1e-5 on logits of size 10.
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.dense(), tmp_path / "adapter").eval()), logits(model), rtol=0, atol=1e-4
    )
    again, _ = lorafit.load(tmp_path / "adapter", compute="fp32")  # which says where its base is
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    # Only this model was changed, and no class.
    assert type(model).save_pretrained is theirs
    assert "save_pretrained" not in vars(lorafit.load(tiny.path)[0])


def test_of_a_base_that_was_quantised_while_it_was_loaded(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "base")
    model, _ = lorafit.load(tmp_path / "base", quantize="nf4", compute="fp32")
    lorafit.attach(model, lorafit.QLoRA(rank=4))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").quantize == "nf4"
    again, _ = lorafit.load(tmp_path / "base", adapter=tmp_path / "adapter", compute="fp32")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ConfigError, match=r"--quantize fp4: .* quantised to nf4; leave it out"):
        lorafit.load(tmp_path / "base", adapter=tmp_path / "adapter", quantize="fp4")


def test_nothing_is_left_of_an_adapter_that_was_saved_there_before(tiny: TinyLlama, tmp_path: Path) -> None:
    for config in (lorafit.QALoRA(rank=2), lorafit.LoRA(rank=4)):
        model, _ = lorafit.load(tiny.path, compute="fp32")
        lorafit.attach(model, config)
        model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "qalora_offsets.safetensors").exists() == (config.method == "qalora")


def test_of_a_model_that_transformers_loaded(tmp_path: Path) -> None:
    model = write_tiny_directory(tmp_path / "base")
    for name, sha256 in ((str(tmp_path / "base"), fingerprint(tmp_path / "base")), ("someone/model", "")):
        model = type(model).from_pretrained(tmp_path / "base")
        model.name_or_path = name
        lorafit.attach(model, lorafit.LoRA(rank=4))
        fill(model)
        model.save_pretrained(tmp_path / "adapter")
        record = read_record(tmp_path / "adapter")
        assert (record.base, record.base_sha256) == (name, sha256)


def test_nothing_is_uploaded_and_one_process_writes(tiny: TinyLlama, tmp_path: Path) -> None:
    model, _ = lorafit.load(tiny.path)
    lorafit.attach(model, lorafit.LoRA(rank=4))
    with pytest.raises(ConfigError, match="push_to_hub: lorafit uploads nothing"):
        model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()
