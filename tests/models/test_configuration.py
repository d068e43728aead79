"""Metadata and tensors of every family, in both directions, against files that gguf-py wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lorafit.containers.gguf import GGUFFile
from lorafit.errors import ModelError
from lorafit.formats import dequantize
from lorafit.models import keymap
from lorafit.models.configuration import config_fields, metadata_of
from tests.models.test_families import VARIANTS
from tests.oracles.family_gguf import KINDS, checkpoint_arrays, random_model, write_family

# What lorafit writes without need, or what stands in a file without effect: a number that is the default anyway.
_AT_WILL = {
    *(
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
}


def read_factors(file: GGUFFile) -> dict[str, torch.Tensor]:
    infos = [info for info in file.tensors.values() if info.name.startswith("rope")]
    return {info.name: dequantize(file.blocks(info.name), info.format, info.shape) for info in infos}


def same(one: Any, other: Any) -> bool:
    """Equal but for the rounding to float32 that a file brings."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata_are_those_of_the_file_and_mean_the_same(tmp_path: Path, variant: str) -> None:
    family, config, options = VARIANTS[variant]
    model = random_model(family, **config)
    file = GGUFFile.open(write_family(tmp_path / "model.gguf", family, model, **options))
    metadata, factors = metadata_of(model.config)
    prefix = f"{file.metadata['general.architecture']}."
    given = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
    assert {key.removeprefix(prefix) for key in metadata.keys() ^ given.keys()} - {"general.architecture"} <= _AT_WILL
    for key in (metadata.keys() & given.keys()) - {f"{prefix}attention.sliding_window_pattern"}:
        assert type(metadata[key]) is type(given[key]), key
        assert same(metadata[key], given[key]), key
    found = read_factors(file)
    assert found.keys() == factors.keys()
    for name, values in found.items():
        torch.testing.assert_close(factors[name], values, rtol=1e-6, atol=0)
    fields = config_fields(file.metadata, "here", found)
    assert same(config_fields(metadata, "here", factors), fields)
    known = keymap.family_of_file(file.metadata, "here")
    again, _ = metadata_of(AutoConfig.for_model(known.model_type, **fields))
    assert same(again, metadata)


@pytest.mark.parametrize("family", KINDS)
def test_names_and_orders_of_all_tensors(tmp_path: Path, family: str) -> None:
    model = random_model(family, tie_word_embeddings=family == "gemma2")
    file = GGUFFile.open(write_family(tmp_path / "model.gguf", family, model))
    table = keymap.family_of_model(model.config.model_type, "here")
    written = {}
    for hf_name, array in checkpoint_arrays(model):
        name, values = keymap.to_file(hf_name, torch.from_numpy(array), table, model.config)
        assert keymap.hf_name(name, table) == hf_name
        written[name] = values
    assert written.keys() == file.tensors.keys()
    for name, info in file.tensors.items():
        assert torch.equal(written[name], dequantize(file.blocks(name), info.format, info.shape)), name
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.sinks is not a tensor of the \w+ family"):
        keymap.to_file("model.layers.0.self_attn.sinks", torch.ones(4), table, model.config)


LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}


def test_llama_3_rules_are_recognised() -> None:
    """As numbers of the configuration they can be written to a config.json, which factors cannot."""
    model = random_model("llama", rope_parameters=LLAMA3, head_dim=64, max_position_embeddings=131072)
    metadata, factors = metadata_of(model.config)
    # The factors are the ratio of transformers' frequencies, by which llama.cpp divides.
    plain = random_model("llama", rope_parameters={**LLAMA3, "rope_type": "default"}, head_dim=64).model.rotary_emb
    ratio = plain.inv_freq / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(factors["rope_freqs.weight"], ratio, rtol=1e-5, atol=0)
    read = config_fields(metadata, "here", factors)["rope_parameters"]
    assert same(read, LLAMA3)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no place for no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 3}, "no place for no_rope_layer"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "no place for"),
        ("gemma2", {"query_pre_attn_scalar": 50}, "no place for query_pre_attn_scalar = 50 of a gemma2 model"),
        ("gemma3", {"query_pre_attn_scalar": 50}, "no place for query_pre_attn_scalar"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "no place for attn_logit_softcapping"),
        ("qwen3", {"hidden_act": "gelu"}, "no place for hidden_act = gelu"),
        ("llama", {"attention_dropout": 0.1}, "no place for attention_dropout"),
        ("smollm3", {"rope_parameters": LLAMA3}, "no rotary scaling 'llama3'"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_gguf_cannot_say_is_refused(family: str, config: dict[str, Any], message: str) -> None:
    kind = KINDS[family]
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5, "num_key_value_heads": 2}
    with pytest.raises(ModelError, match=message):
        metadata_of(AutoConfig.for_model(kind.model_type, **fields | {"pad_token_id": None} | config))


def test_any_number_of_dimensions_may_be_rotated() -> None:
    """transformers multiplies the share and rounds down: 49 · (1/49) is 0.98 of one."""
    for size in range(2, 260, 2):
        for rotated in range(2, size, 2):
            keys = {
                **{"block_count": 1, "context_length": 64, "embedding_length": size, "feed_forward_length": 32},
                **{
                    "attention.head_count": 1,
                    "attention.layer_norm_rms_epsilon": 1e-5,
                    "rope.dimension_count": rotated,
                },
            }
            metadata = {"general.architecture": "phi3"} | {f"phi3.{key}": value for key, value in keys.items()}
            share = config_fields(metadata, "here")["rope_parameters"]["partial_rotary_factor"]
            assert int(size * share) == rotated, (size, rotated)


UNKNOWN = [
    ("llama", {"attention.scale": 0.5}),
    ("llama", {"attention.causal": False}),
    ("llama", {"attention.sliding_window": [8, 8]}),
    ("llama", {"attention.sliding_window": "8"}),
    ("llama", {"logit_scale": 2.0}),
    ("llama", {"rope.scaling.yarn_log_multiplier": 0.1}),
    ("llama", {"attention.temperature_scale": 0.1}),
    ("llama", {"a.key.of.tomorrow": "on"}),
    ("qwen2", {"attention.sliding_window": 8}),
    ("qwen3", {"attention.sliding_window": 8}),
    ("qwen3", {"expert_count": 4}),
    ("gemma2", {"rope.freq_base_swa": 100.0}),
    ("gemma3", {"attn_logit_softcapping": 5.0}),
    ("phi3", {"attention.sliding_window_pattern": 2}),
    ("olmo2", {"attention.sliding_window": 8}),
    ("granite", {"rope.scaling.finetuned": False}),
    ("smollm3", {"no_rope_layer_step": 3}),
]


@pytest.mark.parametrize(("family", "keys"), UNKNOWN)
def test_settings_that_are_not_carried_out_are_named(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    path = write_family(tmp_path / "model.gguf", family, random_model(family), metadata=keys)
    (key,) = keys
    with pytest.raises(ModelError, match=rf"\.{key}|mixture-of-experts") as caught:
        config_fields(GGUFFile.open(path).metadata, str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"vocab_size": 7, "attention.causal": True, "expert_count": 0, "rope.scaling.finetuned": False}),
        ("qwen2", {"attention.sliding_window": 0, "attention.scale": 0.0, "tensor_data_layout": "Meta AI original"}),
        ("granite", {"residual_scale": 0.0, "embedding_scale": 0.0, "rope.scaling.finetuned": True}),
        ("phi3", {"attention.sliding_window": 0}),
    ],
)
def test_settings_without_effect_are_let_through(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    path = write_family(tmp_path / "model.gguf", family, random_model(family), metadata=keys)
    config_fields(GGUFFile.open(path).metadata, str(path))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("phi3", {"attention.key_length": 24}, "heads of 24 dimensions are not supported in this family"),
        ("olmo2", {"attention.key_length": 24}, "heads of 24 dimensions are not supported in this family"),
        ("phi3", {"rope.dimension_count": 9}, "rope.dimension_count = 9 are not supported"),
        ("phi3", {"rope.dimension_count": 20}, "rope.dimension_count = 20 are not supported"),
        ("granite", {"logit_scale": None}, "the metadata lack granite.logit_scale"),
        ("granite", {"logit_scale": 0.0}, "granite.logit_scale is 0.0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "gemma2.final_logit_softcapping is 0.0"),
        ("gemma2", {"attention.sliding_window_pattern": "often"}, "neither a number nor a list for 3 layers"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "neither a number nor a list for 7 layers"),
        ("qwen3", {"rope.scaling.type": "longrope"}, "rotary scaling 'longrope' is not supported"),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast = 8.0 is not"),
        ("phi3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rotary scaling 'yarn' is not supported"),
        ("qwen3moe", {"expert_used_count": 6}, "each token is to go to 6 experts, but there are 5"),
        ("phi3", {"rope.scaling.factor": 2.0}, "rotary scaling 'linear' is not supported"),
    ],
)
def test_impossible_settings(tmp_path: Path, family: str, keys: dict[str, Any], message: str) -> None:
    path = write_family(tmp_path / "model.gguf", family, random_model(family), metadata=keys)
    with pytest.raises(ModelError, match=message):
        config_fields(GGUFFile.open(path).metadata, str(path))
