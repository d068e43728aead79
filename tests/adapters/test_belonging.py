"""An adapter is loaded beside its own base, and where that cannot be told, the user is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorafit
from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError, LorafitWarning, MissingFileError, ModelError
from lorafit.modules import adapter_modules
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "Tiny-Llama-Q4_1.gguf")


def write_peft(model: Any, directory: Path, base: str) -> None:
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    peft.peft_config["default"].base_model_name_or_path = base
    peft.save_pretrained(directory)


@pytest.mark.parametrize("base", ["someone/tiny-llama", "Tiny_Llama/", "/elsewhere/tiny-llama-BF16.gguf"])
def test_an_adapter_that_names_its_base_is_loaded_without_a_word(
    tiny: TinyLlama, tmp_path: Path, recwarn: pytest.WarningsRecorder, base: str
) -> None:
    write_peft(tiny.dense(), tmp_path, base)
    model, _ = lorafit.load(tiny.path, adapter=tmp_path)
    assert len(adapter_modules(model)) == 2
    assert not [each for each in recwarn if each.category is LorafitWarning]


@pytest.mark.parametrize(
    ("base", "said"),
    [("someone/tiny-llama-instruct", "names someone/tiny-llama-instruct as its base"), ("", "does not name its base")],
)
def test_one_that_names_another_is_loaded_with_a_warning(
    tiny: TinyLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: str, said: str
) -> None:
    write_peft(tiny.dense(), tmp_path, base)
    with pytest.warns(LorafitWarning, match=rf"{said}.* only the shapes"):
        lorafit.load(tiny.path, adapter=tmp_path)
    assert main(["generate", str(tiny.path), "Who?", "--adapter", str(tmp_path), "--max-tokens", "2"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path} {said}")
    assert error.count("\n") == 1


def test_another_base_than_that_of_the_hash_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "Tiny-Llama-Q4_1.gguf", seed=1)
    model, _ = lorafit.load(tiny.path)
    lorafit.attach(model, lorafit.LoRA(rank=2))
    model.save_pretrained(tmp_path / "adapter")
    lorafit.load(tiny.path, adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"is not what .* was trained on"):
        lorafit.load(other.path, adapter=tmp_path / "adapter")


def test_an_adapter_of_other_shapes_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "wide.gguf", hidden=128)
    write_peft(other.dense(), tmp_path / "adapter", "tiny-llama")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight has the shape \[4, 128\], not \[4, 64\]"):
        lorafit.load(tiny.path, adapter=tmp_path / "adapter")


def test_an_adapter_without_its_base_and_a_run_with_another_adapter(tiny: TinyLlama, tmp_path: Path) -> None:
    write_peft(tiny.dense(), tmp_path, "someone/tiny")
    with pytest.raises(MissingFileError, match=r"is an adapter for someone/tiny, which is not here; .* --adapter"):
        lorafit.load(tmp_path)
    with pytest.raises(ConfigError, match="has an adapter of its own"):
        lorafit.load(tmp_path, adapter=tmp_path)


def test_a_model_with_an_adapter_in_its_directory_is_not_guessed_at(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds a model and an adapter .* of its own"):
        lorafit.load(tmp_path)
