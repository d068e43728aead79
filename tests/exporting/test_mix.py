"""Which tensor gets which format: as llama.cpp's own quantiser chose for files of the same models.

The shared library that tests have does not export that quantiser. What is here was read off files that the one in the
package ``@node-llama-cpp/linux-x64`` 3.22.1 wrote, of models of these shapes.
"""

import pytest

from lorafit.config import GGUFType
from lorafit.exporting.mix import Mix

# Depth of a model -> layers in which Q4_K_M and Q5_K_M give values and ffn_down more bits.
MORE_BITS = {
    2: [1],
    7: [2, 5, 6],
    9: [0, 3, 6, 7, 8],
    17: [0, 1, 4, 7, 10, 13, 14, 15, 16],
    30: [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29],
    32: [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31],
}


def mix(type: GGUFType, layers: int = 9, *, head: str = "output.weight", experts: int = 0, gqa: bool = True) -> Mix:
    return Mix(type, layers, head, experts, gqa)


@pytest.mark.parametrize("layers", MORE_BITS)
@pytest.mark.parametrize(("type", "usual"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
@pytest.mark.parametrize("part", ["attn_v", "attn_qkv", "ffn_down", "ffn_down_exps"])
def test_some_layers_get_more_bits(type: GGUFType, usual: str, layers: int, part: str) -> None:
    rules = mix(type, layers)
    formats = [rules.format_of(f"blk.{i}.{part}.weight", (256, 512))[0] for i in range(layers)]
    assert [i for i, name in enumerate(formats) if name != usual] == MORE_BITS[layers]
    assert set(formats) == {usual, "Q6_K"}
    for other in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_gate_exps"):
        assert rules.format_of(f"blk.{layers - 1}.{other}.weight", (256, 512))[0] == usual


@pytest.mark.parametrize(
    ("type", "head", "embedding"),
    [
        *[(name, name.upper(), name.upper()) for name in ("f32", "f16", "bf16", "q8_0", "q6_k")],
        *[(name, "Q6_K", name.upper()) for name in ("q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")],
        ("q5_k_m", "Q6_K", "Q5_K"),
        ("q4_k_m", "Q6_K", "Q4_K"),
    ],
)
def test_the_head_gets_more_bits_and_so_does_an_embedding_that_is_one(
    type: GGUFType, head: str, embedding: str
) -> None:
    assert mix(type).format_of("output.weight", (320, 256))[0] == head
    assert mix(type).format_of("token_embd.weight", (320, 256))[0] == embedding
    assert mix(type, head="token_embd.weight").format_of("token_embd.weight", (320, 256))[0] == head


@pytest.mark.parametrize(
    ("type", "width", "found", "wanted"),
    [
        ("q4_k", 288, "Q5_0", "Q4_K"),
        ("q5_k", 288, "Q5_1", "Q5_K"),
        ("q6_k", 288, "Q8_0", "Q6_K"),
        ("q4_k", 272, "F16", "Q4_K"),
        ("q4_1", 272, "F16", "Q4_1"),
        ("q4_1", 288, "Q4_1", "Q4_1"),
        ("q4_k", 256, "Q4_K", "Q4_K"),
        ("f16", 271, "F16", "F16"),
    ],
)
def test_rows_that_are_no_whole_number_of_blocks(type: GGUFType, width: int, found: str, wanted: str) -> None:
    assert mix(type).format_of("blk.1.ffn_up.weight", (64, width)) == (found, wanted)
    head = mix(type).format_of("output.weight", (64, width))[0]
    assert head == {256: "Q6_K", 288: "Q8_0"}.get(width, "F16")


def test_what_stays_float() -> None:
    for name in ("blk.0.ffn_gate_inp.weight", "rope_freqs.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.bias"):
        shape = (8, 256) if "gate_inp" in name else (256,)
        assert mix("q4_k_m").format_of(name, shape) == ("F32", "F32")
        assert mix("f16").format_of(name, shape) == ("F32", "F32")


def test_eight_experts_and_eighty_layers() -> None:
    """What Mixtral and models of 70 billion weights get."""
    parts = {"attn_v": "Q8_0", "attn_k": "Q8_0", "attn_output": "Q5_K", "attn_q": "Q4_K", "ffn_up_exps": "Q4_K"}
    for part, format in parts.items():
        assert mix("q4_k_m", experts=8).format_of(f"blk.4.{part}.weight", (256, 256))[0] == format
    assert mix("q5_k_m", experts=8).format_of("blk.4.attn_output.weight", (256, 256))[0] == "Q5_K"
    assert mix("q4_k_m", 80).format_of("blk.10.attn_v.weight", (256, 256))[0] == "Q5_K"
    assert mix("q4_k_m", 80, gqa=False).format_of("blk.10.attn_v.weight", (256, 256))[0] == "Q4_K"
    assert mix("q4_k_m", 80).format_of("blk.12.attn_v.weight", (256, 256))[0] == "Q6_K"
    assert mix("q5_k_m", 80).format_of("blk.10.attn_v.weight", (256, 256))[0] == "Q5_K"
