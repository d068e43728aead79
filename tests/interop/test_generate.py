"""``generate`` of transformers on a model that lorafit attached to, against the same model merged and dense."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorafit
from lorafit.config import AdapterConfig
from lorafit.modules import QALoRALinear, adapter_modules
from tests.oracles.adapted import fill
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

PROMPTS = [list(range(40, 52)), [9, 100, 31], [200, 17, 45, 8, 77, 151, 23]]
PAD = 2
NEW = 12
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def pair(tiny: TinyLlama, config: AdapterConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The attached model with a random adapter, and the dense one with the same weights, merged."""
    model, _ = lorafit.load(tiny.path, compute="fp32")
    torch.manual_seed(0)
    lorafit.attach(model, config)
    fill(model, std=0.1)
    dense = tiny.dense()
    for name, module in adapter_modules(model).items():
        dense.get_submodule(name).weight.data += module.delta_weight()
    return model, dense


def generated(model: PreTrainedModel, tokens: Tensor, mask: Tensor, **mode: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=PAD, eos_token_id=None, **mode
    )


def left_padded() -> tuple[Tensor, Tensor]:
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return tokens, mask


@pytest.mark.parametrize("config", [lorafit.LoRA(rank=4), lorafit.QALoRA(rank=2)], ids=["lora", "qalora"])
@pytest.mark.parametrize("mode", MODES)
def test_as_the_merged_model_generates(mode: str, config: AdapterConfig, tiny: TinyLlama) -> None:
    model, dense = pair(tiny, config)
    tokens, mask = left_padded()
    found = generated(model, tokens, mask, **MODES[mode])
    assert found.shape == (len(PROMPTS), tokens.shape[1] + NEW)
    assert torch.equal(found, generated(dense, tokens, mask, **MODES[mode]))
    base = generated(lorafit.load(tiny.path, compute="fp32")[0], tokens, mask, **MODES[mode])
    assert not torch.equal(found, base)
    if isinstance(config, lorafit.QALoRA):
        assert any(isinstance(module, QALoRALinear) for module in model.modules())


def test_padding_changes_nothing(tiny: TinyLlama) -> None:
    model, _ = pair(tiny, lorafit.LoRA(rank=4))
    tokens, mask = left_padded()
    together = generated(model, tokens, mask, do_sample=False)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = generated(model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), do_sample=False)
        assert torch.equal(alone[0, len(prompt) :], row[-NEW:])


def test_generating_between_steps_of_training(tiny: TinyLlama) -> None:
    """Somebody looks at what the model says while it trains, in training mode and with gradients."""
    model, _ = pair(tiny, lorafit.QALoRA(rank=2))
    tokens, mask = left_padded()
    before = generated(model, tokens, mask, do_sample=False)
    model.train()
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert torch.equal(generated(model, tokens, mask, do_sample=False), before)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.equal(generated(model, tokens, mask, do_sample=False), before)
