"""Every common form of PEFT's LoRA, both ways: the same logits, and the same gradients for those who train on."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafit.adapters import AdapterRecord, load_adapter, read_record, save_adapter
from lorafit.adapters.parts import parts
from lorafit.adapters.peft import WEIGHTS_FILE
from lorafit.config import LoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.models.load import load_base
from lorafit.modules import LoRAExperts, adapter_modules, adapters_disabled, attach
from tests.oracles.adapted import fill
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT asks transformers for something by an old name
    "ignore:Model has `tie_word_embeddings=True`",  # PEFT says that a copy of a tied head is no longer tied
    "ignore:Could not find a config file",
    "ignore:Setting `save_embedding_layers` to `True`",
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
    "an embedding by LoRA": {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 3}},
    "embedding and head by LoRA": {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
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
        if part.transposed:
            theirs_grad = theirs_grad.T
        if isinstance(part.module, LoRAExperts):  # whose factors PEFT keeps in two matrices
            ours_grad = ours_grad.flatten(0, 1) if part.name == "A" else ours_grad.permute(1, 2, 0).flatten(1)
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
    both_ways(tiny.path, tiny.dense, FORMS[form], tmp_path)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("gemma3_text", "tokens"),  # whose embedding is multiplied by a factor
        ("gemma3_text", "an embedding"),
        ("gemma3_text", "an embedding by LoRA"),
        ("gemma3_text", "norms"),
        ("qwen2", "dora, everywhere, rsLoRA, ranks"),  # which has biases
        ("qwen2", "a layer"),
        ("phi3", "fused"),
        ("qwen3_moe", "experts"),
    ],
)
def test_other_families(tmp_path: Path, family: str, form: str) -> None:
    others: dict[str, dict[str, Any]] = {
        "fused": {"r": 4, "target_modules": ["qkv_proj", "down_proj"], "rank_pattern": {"qkv_proj": 6}},
        "experts": {
            "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5},
        },
    }  # fmt: skip
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    write_tiny_directory(tmp_path / "base", family, **fields)
    both_ways(
        tmp_path / "base",
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval(),
        (FORMS | others)[form],
        tmp_path,
    )


def both_ways(base: Path, dense: Callable[[], PreTrainedModel], settings: Mapping[str, Any], tmp_path: Path) -> None:
    """An adapter that PEFT made is loaded, saved, and loaded by PEFT; it computes and learns the same each time."""
    peft = peft_model(dense(), settings)
    peft.save_pretrained(tmp_path / "peft")  # of adapters of embeddings and heads with a copy of these
    model = load_base(base, compute="fp32").model
    before = logits(model)
    record, coverage = load_adapter(model, tmp_path / "peft")
    # float32 through two layers: measured 1e-5 on logits of size 10.
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-4)
    assert float((logits(model) - before).abs().max()) > 0.1
    assert coverage.trainable_parameters == peft.num_parameters(only_trainable=True)
    same_gradients(model, peft)
    with adapters_disabled(model):
        # Equal, but for experts, which are computed in another order once something may be attached to them.
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)

    # And back: PEFT computes the same from what lorafit saves, and lorafit reads what it wrote.
    save_adapter(model, tmp_path / "ours", record)
    assert read_record(tmp_path / "ours") == record
    again = PeftModel.from_pretrained(dense(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(logits(again.eval()), logits(peft), rtol=0, atol=1e-4)
    same_gradients(model, again)
    other = load_base(base, compute="fp32").model
    load_adapter(other, tmp_path / "ours")
    assert torch.equal(logits(other), logits(model.eval()))


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(directory / WEIGHTS_FILE))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def as_raw(key: str) -> str:
    """A tensor's name in the state dict of a model of PEFT, from that in its file."""
    module, _, end = key.rpartition(".")
    if end == "lora_magnitude_vector" or "_delta" in end or "_embedding_" in end:
        return f"{key}.default"
    return f"{module}.default.{end}" if "lora_" in key else f"{module}.modules_to_save.default.{end}"


@pytest.mark.parametrize("form", ["tokens, norms, dora, ranks", "embedding and head", "an embedding by LoRA"])
def test_older_files_and_other_types_of_numbers(untied: TinyLlama, tmp_path: Path, form: str) -> None:
    peft_model(untied.dense(), FORMS[form]).save_pretrained(tmp_path / "new", save_embedding_layers=False)
    expected = adapted(untied, tmp_path / "new")
    named = Path(shutil.copytree(tmp_path / "new", tmp_path / "named"))
    rewritten(named, lambda tensors: {as_raw(key): tensor for key, tensor in tensors.items()})
    assert not load_file(named / WEIGHTS_FILE).keys() & load_file(tmp_path / "new" / WEIGHTS_FILE).keys()
    pickled = Path(shutil.copytree(tmp_path / "new", tmp_path / "pickled"))
    torch.save(load_file(pickled / WEIGHTS_FILE), pickled / "adapter_model.bin")
    (pickled / WEIGHTS_FILE).unlink()
    for directory in (named, pickled):
        assert torch.equal(adapted(untied, directory), expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = Path(shutil.copytree(tmp_path / "new", tmp_path / str(dtype)))
        rewritten(half, lambda tensors, dtype=dtype: {key: tensor.to(dtype) for key, tensor in tensors.items()})
        found = adapted(untied, half)
        rewritten(half, lambda tensors: {key: tensor.float() for key, tensor in tensors.items()})
        assert torch.equal(found, adapted(untied, half))
        assert not torch.equal(found, expected)


def adapted(tiny: TinyLlama, directory: Path) -> Tensor:
    model = load_base(tiny.path, compute="fp32").model
    load_adapter(model, directory)
    return logits(model)


def test_a_pickle_with_more_than_tensors_in_it_is_not_opened(tied: TinyLlama, tmp_path: Path) -> None:
    peft_model(tied.dense(), QV).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    for content in ({"a": Path("x")}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(AdapterError, match=r"adapter_model\.bin is not a usable file of tensors"):
            adapted(tied, tmp_path)


def test_a_copy_of_another_base_is_refused(untied: TinyLlama, tmp_path: Path) -> None:
    peft_model(untied.dense(), FORMS["embedding and head by LoRA"]).save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    rewritten(tmp_path, lambda tensors: tensors | {key: tensors[key] * 1.01})
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight is a copy of .* not that of this base"):
        adapted(untied, tmp_path)
    rewritten(tmp_path, lambda tensors: tensors | {key: torch.zeros(330, 64)})
    with pytest.raises(AdapterError, match="changed vocabulary"):
        adapted(untied, tmp_path)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"modules_to_save": ("score",)}, "modules_to_save: the model has no module whose name ends with score"),
        ({"modules_to_save": ("mlp",)}, r"modules_to_save: model\.layers\.0\.mlp consists of several modules"),
        ({"modules_to_save": ("act_fn",)}, "has no weights to train"),
        ({"modules_to_save": ("q_proj",), "targets": "q_proj,v_proj,o_proj"}, None),
        ({"modules_to_save": ("_proj",), "targets": "q_proj"}, r"q_proj cannot be trained in two ways"),
        ({"trainable_token_indices": {"embeddings": (1,)}}, "no module whose name ends with embeddings"),
        ({"trainable_token_indices": {"norm": (1,)}}, "is no embedding"),
        ({"trainable_token_indices": {"embed_tokens": (1, 320)}}, "must differ and lie between 0 and 319"),
        ({"trainable_token_indices": {"embed_tokens": (1, 1)}}, "must differ"),
        ({"trainable_token_indices": {"embed_tokens": ()}}, "must differ"),
        ({"trainable_token_indices": {"embed_tokens": (1,)}, "modules_to_save": ("embed_tokens",)}, "in two ways"),
        ({"trainable_token_indices": {"embed_tokens": (1,)}, "targets": "lm_head"}, "lm_head cannot be trained in two"),
        ({"rank_pattern": {"o_proj": 2}}, "rank_pattern: no layer that is trained takes what is said of o_proj"),
        ({"alpha_pattern": {"q_proj": 2, "o_proj": 2}}, "alpha_pattern: no layer .* of o_proj"),
        ({"rank_pattern": {"q_proj(": 2}}, "neither a name nor a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank is 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "whole numbers"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha is -1"),
        ({"rank_pattern": {"q_proj": 2}, "scaling": "plain"}, "rank_pattern does not go with scaling plain"),
    ],
)
def test_what_cannot_be_trained_so_is_said_by_name(
    tied: TinyLlama, settings: dict[str, Any], complaint: str | None
) -> None:
    model = load_base(tied.path).model
    if complaint is None:
        attach(model, LoRA(**settings))
        return
    with pytest.raises((AdapterError, ConfigError), match=complaint):
        attach(model, LoRA(**({"rank": 2, "targets": "q_proj,v_proj"} | settings)))
    assert not adapter_modules(model)


def test_plain_scaling_with_alphas_of_single_layers(tied: TinyLlama, tmp_path: Path) -> None:
    config = LoRA(rank=4, alpha=0.5, scaling="plain", targets="q_proj,v_proj", alpha_pattern={"v_proj": 2.0})
    model = load_base(tied.path, compute="fp32").model
    attach(model, config)
    fill(model)
    save_adapter(model, tmp_path, AdapterRecord(config, "tiny", ""))
    peft = PeftModel.from_pretrained(tied.dense(), tmp_path).eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-4)


def test_an_adapter_of_several_kinds_is_no_low_rank_update(tied: TinyLlama) -> None:
    model = load_base(tied.path).model
    attach(model, LoRA(rank=2, modules_to_save=("norm",), targets="q_proj"))
    with pytest.raises(AdapterError, match=r"model\.norm is not adapted by LoRA but trained itself"):
        adapter_modules(model)["model.norm"].lora_factors()
