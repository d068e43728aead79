"""Every common form of PEFT's LoRA, both ways: the same logits, and the same gradients for those who train on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorafit.adapters import load_adapter, read_record, save_adapter
from lorafit.adapters.parts import parts
from lorafit.models.load import load_base
from lorafit.modules import adapters_disabled
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT asks transformers for something by an old name
    "ignore:Model has `tie_word_embeddings=True`",  # PEFT says that a copy of a tied head is no longer tied
    "ignore:Could not find a config file",
)

TOKENS = torch.tensor([list(range(40, 90))])
QV: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
FORMS: dict[str, dict[str, Any]] = {
    "dora": QV | {"use_dora": True},
    "dora, everywhere, rsLoRA, ranks": {
        "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True, "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
    },
    "ranks": QV | {"rank_pattern": {"q_proj": 2}},
    "alphas, and two that match": QV | {"alpha_pattern": {r"layers\.1\..*": 3, "v_proj": 20}},
    "ranks and alphas, rsLoRA": QV | {
        "use_rslora": True, "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 7},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "v_proj": 2.5},
    },
    "one block": QV | {"layers_to_transform": 1},
    "blocks of a list": QV | {"layers_to_transform": [0], "layers_pattern": "layers"},
    "all but some": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all but a pattern": {"r": 4, "target_modules": r".*_proj", "exclude_modules": r".*\.0\..*|.*down.*"},
    "a head": QV | {"modules_to_save": ["lm_head"]},
    "embedding and head": QV | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "an embedding": QV | {"modules_to_save": ["model.embed_tokens"]},
    "norms": QV | {"modules_to_save": ["input_layernorm", "model.norm"]},
    "a layer": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["layers.0.self_attn.q_proj"]},
    "tokens": QV | {"trainable_token_indices": [41, 7, 300]},
    "tokens of the head": QV | {"trainable_token_indices": {"lm_head": [41, 7]}},
    "tokens of both": QV | {"trainable_token_indices": {"embed_tokens": [41, 50], "lm_head": [41, 50]}},
    "different tokens of both": QV | {"trainable_token_indices": {"embed_tokens": [41], "lm_head": [60, 61]}},
    "tokens, norms, dora, ranks": QV | {
        "use_dora": True, "rank_pattern": {"v_proj": 3}, "trainable_token_indices": [45], "modules_to_save": ["norm"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tied") / "tiny.gguf")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("untied") / "tiny.gguf", tied=False)


def peft_model(model: PreTrainedModel, settings: Mapping[str, Any]) -> Any:
    """A model of PEFT of which everything that is trained has moved from where it began."""
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(**settings))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return peft.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def loss_of(model: Any) -> Tensor:
    output = model(TOKENS).logits[0].float()
    return F.cross_entropy(output[:-1], TOKENS[0, 1:])


def same_gradients(ours: nn.Module, peft: Any) -> None:
    """Everything that either of them trains has the gradient that it has in the other."""
    for model in (ours, peft):
        model.train()
        model.zero_grad(set_to_none=True)
        loss_of(model).backward()
    # By the names that both have in files: each of PEFT's tensors is replaced by the parameter that it came from.
    named = {parameter.data_ptr(): parameter for parameter in peft.parameters() if parameter.requires_grad}
    theirs = {
        key: named[tensor.data_ptr()]
        for key, tensor in get_peft_model_state_dict(peft, save_embedding_layers=False).items()
    }
    found = {key: part.module.adapter_parameters() for key, part in parts(ours).items()}
    assert found.keys() == theirs.keys()
    for key, part in parts(ours).items():
        name = {"A": "lora_A", "B": "lora_B"}.get(part.name, part.name)
        ours_grad, theirs_grad = part.module.adapter_parameters()[name].grad, theirs[key].grad
        assert ours_grad is not None, key
        assert theirs_grad is not None, key
        assert float(theirs_grad.abs().max()) > 0, key
        # float32 through two layers, forward and backward; measured 2e-7 where gradients are of size 0.1.
        torch.testing.assert_close(
            ours_grad, theirs_grad, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_what_peft_wrote_computes_and_learns_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, form: str
) -> None:
    tiny: TinyLlama = request.getfixturevalue(base)
    peft = peft_model(tiny.dense(), FORMS[form])
    peft.save_pretrained(tmp_path / "peft")
    model = load_base(tiny.path, compute="fp32").model
    before = logits(model)
    record, coverage = load_adapter(model, tmp_path / "peft")
    # float32 through two layers: measured 1e-5 on logits of size 10.
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-4)
    assert float((logits(model) - before).abs().max()) > 0.1
    assert coverage.trainable_parameters == peft.num_parameters(only_trainable=True)
    same_gradients(model, peft)
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)

    # And back: PEFT computes the same from what lorafit saves, and lorafit reads what it wrote.
    save_adapter(model, tmp_path / "ours", record)
    assert read_record(tmp_path / "ours") == record
    again = PeftModel.from_pretrained(tiny.dense(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(logits(again.eval()), logits(peft), rtol=0, atol=1e-4)
    same_gradients(model, again)
    other = load_base(tiny.path, compute="fp32").model
    load_adapter(other, tmp_path / "ours")
    assert torch.equal(logits(other), logits(model.eval()))
