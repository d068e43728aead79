"""Loading directories of safetensors: the model that transformers saved, or one error that says all that is wrong."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lorafit.errors import ModelError
from lorafit.models.load import load, load_base
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

IDS = torch.randint(3, 260, (1, 50), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """[T, vocabulary]."""
    return model(input_ids=IDS, use_cache=False).logits[0]


def assert_close(result: Tensor, expected: Tensor) -> None:
    """The same float32 products in another order, two layers deep: some 1e-6 of logits that reach 10."""
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def directory(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    tiny.dense().save_pretrained(path)
    load(tiny.path)[1].save_pretrained(path)
    return path


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | fields))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    return edit


def put(value: float, name: str) -> Callable[[dict[str, Tensor]], object]:
    """Put a number into the middle of a weight."""
    return lambda weights: weights[name].view(-1)[weights[name].numel() // 2].fill_(value)


def cut_weights(length: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:length])

    return edit


def test_a_directory_gives_the_model_that_was_saved(directory: Path, tiny: TinyLlama) -> None:
    model, tokenizer = load(directory, compute="fp32")
    assert_close(logits(model), logits(tiny.dense()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    from_gguf = load(tiny.path)[1]
    text = "<|im_start|>The miller's 3 sons<|im_end|>"
    assert tokenizer.encode(text) == from_gguf.encode(text)
    assert tokenizer.chat_template == from_gguf.chat_template


def test_a_directory_in_bf16(directory: Path) -> None:
    base = load_base(directory, compute="bf16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16} == {base.compute}


def test_rotary_scaling_of_a_directory_is_transformers_own(directory: Path, tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    }
    path = shutil.copytree(directory, tmp_path / "model")
    edit_config(rope_parameters=rope)(path)
    result = logits(load_base(path, compute="fp32").model)
    assert_close(result, logits(LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")))
    assert (result - logits(load_base(directory, compute="fp32").model)).abs().max() > 1e-2


def break_several(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.0.mlp.up_proj.weight"]
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.sinks"] = torch.zeros(3)
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 4)


def test_all_differences_are_raised_at_once(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    edit_weights(break_several)(path)
    with pytest.raises(ModelError) as caught:
        load_base(path)
    said = str(caught.value)
    assert said.startswith(f"{path} does not hold the model that it describes: ")
    assert set(said.split(": ", 1)[1].split("; ")) == {
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.norm.weight is missing",
        "model.layers.0.self_attn.sinks is not a weight of this architecture",
        "model.layers.1.self_attn.q_proj.weight has the shape [3, 4], not [64, 64]",
    }


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "neither a model nor a run: it has no config.json"),
        (lambda path: (path / "adapter").mkdir(), "model is a run, but a base is wanted here; give the base"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not a JSON object"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "config.json is not a JSON object"),
        (edit_config(model_type="qwen9"), "architecture 'qwen9' is not supported; lorafit knows llama"),
        (edit_config(model_type=None), "architecture 'None' is not supported"),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "sets quantization_config: .*GGUF"),
        (edit_config(quantization_config={"quant_method": "fp8"}), "sets quantization_config"),
        (edit_config(auto_map={"AutoModelForCausalLM": "own.Model"}), "sets auto_map: .*own modelling code"),
        (edit_config(attention_dropout=0.1), "sets attention_dropout: .*set it to 0"),
        (edit_config(resid_pdrop=0.1), "sets resid_pdrop: .*set it to 0"),
        (edit_config(use_bidirectional_attention=True), "sets use_bidirectional_attention: .*only what comes before"),
        (edit_config(rope_parameters=DYNAMIC), "rotary scaling 'dynamic' is not supported: it depends on the longest"),
        (edit_config(hidden_size="wide"), "cannot be loaded: .*hidden_size"),
        (edit_config(num_attention_heads=7), "cannot be loaded: .*heads"),
        (edit_config(hidden_act="magic"), "cannot be loaded: .*magic"),
        (edit_config(rope_parameters={"rope_type": "magic"}), "cannot be loaded: .*magic"),
        (edit_config(num_hidden_layers=3), "model.layers.2.* is missing.* and 4 more"),
        (edit_config(num_hidden_layers=1), "model.layers.1.* is not a weight.* and 4 more"),
        (edit_config(tie_word_embeddings=False), "lm_head.weight is missing"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no .safetensors file"),
        (lambda path: (path / "model.safetensors").rename(path / "other.safetensors"), "cannot be loaded: .*named"),
        (
            edit_weights(put(torch.nan, "model.layers.1.mlp.up_proj.weight")),
            "up_proj.weight holds numbers that are not f",
        ),
        (edit_weights(put(-torch.inf, "model.norm.weight")), "model.norm.weight holds numbers that are not finite"),
        (cut_weights(0), "cannot be loaded: .*header"),
        (cut_weights(1000), "cannot be loaded: .*header"),
        (cut_weights(-1), "cannot be loaded: "),
        (lambda path: (path / "tokenizer.json").unlink(), "its tokenizer cannot be loaded"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
        (lambda path: (path / "tokenizer_config.json").write_text("{"), "its tokenizer cannot be loaded"),
    ],
)
def test_directories_that_cannot_be_used_are_refused(
    directory: Path, tmp_path: Path, edit: Callable[[Path], object], message: str
) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    edit(path)
    with pytest.raises(ModelError, match=message) as caught:
        load_base(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_brings_code_is_refused_without_running_it(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_base(path)
    assert not (tmp_path / "ran").exists()


def test_transformers_talks_as_before_and_not_while_loading(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.INFO)
    try:
        load_base(directory)
        path = shutil.copytree(directory, tmp_path / "model")
        edit_weights(break_several)(path)
        with pytest.raises(ModelError):
            load_base(path)
        assert transformers.utils.logging.get_verbosity() == logging.INFO
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
