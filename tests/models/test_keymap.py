"""Names, configuration and row order of GGUF files, against the tables and the formula of llama.cpp's converter."""

from typing import Any

import gguf
import numpy as np
import pytest

from lorafit.errors import ModelError
from lorafit.models import keymap
from lorafit.models.configuration import config_fields
from tests.oracles.llama_gguf import random_llama, row_in_file

LLAMA = keymap.family_of_model("llama", "here")
GOOD: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
}


def test_names_are_those_of_the_converter() -> None:
    model = random_llama(attention_bias=True, num_hidden_layers=12)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for hf_name, _ in model.named_parameters():
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        assert keymap.hf_name(gguf_name, LLAMA) == hf_name
        assert keymap.gguf_name(hf_name, LLAMA) == gguf_name


@pytest.mark.parametrize(
    "name",
    [
        *("rope_freqs.weight", "blk.0.attn_q", "blk.0.attn_q.scale", "blk.x.attn_q.weight", "blk.0.ffn_up_exps.weight"),
        *("blk.0.token_embd.weight", "attn_q.weight", "blk.0.attn_q.weight ", "", "output.weight\n"),
    ],
)
def test_other_names_have_no_counterpart(name: str) -> None:
    assert keymap.hf_name(name, LLAMA) is None


def test_rows_of_queries_and_keys_move_and_no_others() -> None:
    model = random_llama(head_dim=24, num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    for name, heads in (("attn_q", 6), ("attn_k", 2)):
        for kind in ("weight", "bias"):
            order = keymap.row_order(f"blk.1.{name}.{kind}", LLAMA, model.config)
            assert order is not None
            assert order.tolist() == [row_in_file(row, 24) for row in range(heads * 24)]
    for name in ("blk.1.attn_v.weight", "blk.1.attn_output.weight", "token_embd.weight", "output_norm.weight"):
        assert keymap.row_order(name, LLAMA, model.config) is None


def test_configuration_of_a_plain_model() -> None:
    assert config_fields(GOOD, "here") == {
        **{"num_hidden_layers": 2, "max_position_embeddings": 128, "hidden_size": 64, "intermediate_size": 96},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }


def fields_with(changes: dict[str, Any]) -> dict[str, Any]:
    metadata = GOOD | {f"llama.{key}": value for key, value in changes.items()}
    return config_fields({key: value for key, value in metadata.items() if value is not None}, "here")


def test_what_may_be_left_out() -> None:
    fields = fields_with({"attention.head_count_kv": None, "rope.freq_base": None})
    assert fields["num_key_value_heads"] == 4
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert fields_with({"attention.key_length": 24, "rope.dimension_count": 24})["head_dim"] == 24


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, 4.0),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.attn_factor": 1.0}, None),
    ],
)
def test_rotary_scaling_as_llama_cpp_reads_it(scaling: dict[str, Any], expected: float | None) -> None:
    rope = fields_with(scaling)["rope_parameters"]
    assert rope.get("factor") == expected
    assert rope["rope_type"] == ("default" if expected is None else "linear")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "the metadata lack llama.block_count"),
        ({"attention.head_count": None}, "the metadata lack llama.attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": None}, "the metadata lack llama.attention.layer_norm_rms_epsilon"),
        ({"block_count": 0}, "llama.block_count is 0, which no model has"),
        ({"block_count": -1}, "llama.block_count is -1"),
        ({"embedding_length": 2**31}, "llama.embedding_length is 2147483648"),
        ({"block_count": 2.0}, "llama.block_count is a float"),
        ({"block_count": True}, "llama.block_count is a bool"),
        ({"block_count": "2" * 1000}, "llama.block_count is a str"),
        ({"feed_forward_length": np.array([96, 96])}, "llama.feed_forward_length is a ndarray"),
        ({"attention.head_count_kv": np.array([2, 2])}, "llama.attention.head_count_kv is a ndarray"),
        ({"attention.head_count": 5}, "5 attention heads cannot share 64 dimensions"),
        ({"attention.head_count_kv": 3}, "4 attention heads cannot share 64 dimensions and 3 key heads"),
        ({"attention.head_count": 128}, "128 attention heads"),
        ({"attention.key_length": 15}, "heads of 15 dimensions"),
        ({"attention.key_length": "16"}, "attention.key_length is a str"),
        ({"attention.value_length": 32}, "heads of 16 dimensions with llama.attention.value_length = 32"),
        ({"rope.dimension_count": 8}, "heads of 16 dimensions with llama.rope.dimension_count = 8"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "layer_norm_rms_epsilon is a str"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base is nan"),
        ({"rope.freq_base": float("inf")}, "rope.freq_base is inf"),
        ({"rope.freq_base": -1.0}, "rope.freq_base is -1.0"),
        ({"rope.freq_base": 1.0}, "rope.freq_base is 1.0, which no model has"),
        ({"rope.freq_base": [1.0]}, "rope.freq_base is a list"),
        ({"rope.scaling.type": "dynamic"}, "rotary scaling 'dynamic' is not supported"),
        ({"rope.scaling.type": "longrope"}, "the tensor rope_factors_long.weight is missing"),
        ({"rope.scaling.type": 7}, "rotary scaling '7' is not supported"),
        ({"rope.scaling.type": np.array([1, 2])}, "rotary scaling"),
        ({"rope.scaling.factor": 0.0}, "rope.scaling.factor is 0.0"),
        ({"rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor is not supported"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"expert_count": np.array([8, 8])}, "mixture-of-experts"),
    ],
)
def test_what_no_model_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        fields_with(changes)
    assert str(caught.value).startswith("here: ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("architecture", ["qwen9", None, 7, "x" * 10_000, ["llama"], np.array([1, 2])])
def test_unknown_architectures_name_the_known_ones(architecture: object) -> None:
    with pytest.raises(ModelError, match=r"here: the architecture .* is not supported; lorafit knows llama") as caught:
        config_fields({"general.architecture": architecture}, "here")
    assert len(str(caught.value)) < 200
