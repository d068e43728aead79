"""Every family: a tiny random model, in a file that gguf-py wrote, means the same to lorafit, transformers, llama.cpp.

Compared are log-probabilities of every next token. In F32, transformers and lorafit differ by the order of float32
additions, some 1e-5 of numbers that reach 18; llama.cpp's Gemma by up to 5e-4, from its table of GELU in half
precision. A window, cap, factor, norm or bias that is left out changes them by more than 0.1.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafit.cli import main
from lorafit.models.attention import document_attention
from lorafit.models.load import load_base
from lorafit.models.logits import finish_logits
from lorafit.modules import PackedWeight
from tests.oracles.family_gguf import KINDS, WINDOW, random_model, rounded, write_family
from tests.oracles.llamacpp import LlamaCppOracle

LENGTHS = (12, 1, 30, 3)  # longer and shorter than the window
IDS = torch.randint(3, 260, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of one document through a whole model: [T, vocabulary]."""
    return model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)


def each_alone(of_one: Callable[[Tensor], Tensor], ids: Tensor = IDS, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([of_one(part) for part in ids.split(lengths)])


@torch.no_grad()
def packed(model: PreTrainedModel, ids: Tensor = IDS, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The same for documents laid end to end, on the way that training takes: [T, vocabulary]."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    with document_attention(model):
        hidden = model.get_decoder()(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, document_lengths=lengths
        ).last_hidden_state[0]
    return finish_logits(model, model.get_output_embeddings()(hidden)).log_softmax(-1)


def cpp(path: Path) -> Callable[[Tensor], Tensor]:
    oracle = LlamaCppOracle(path)
    return lambda ids: torch.from_numpy(oracle.logits(ids.tolist())).log_softmax(-1)


def furthest(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max())


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    keys = {"type": kind, "factor": 4.0, **more}
    return {"metadata": {f"rope.scaling.{name}": value for name, value in keys.items()}}


def longrope(original: int, pairs: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and file. The context that llama.cpp takes is at least 256, whatever is asked for."""
    short, long = np.linspace(1.0, 2.0, pairs), np.linspace(1.0, 8.0, pairs)
    parameters = rope(
        "longrope", short_factor=short.tolist(), long_factor=long.tolist(), attention_factor=1.3,
        original_max_position_embeddings=original, factor=512 / original, **more,
    )  # fmt: skip
    keys = {"rope.scaling.attn_factor": 1.3, "rope.scaling.original_context_length": original}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    context = {"max_position_embeddings": 512, "original_max_position_embeddings": original}
    return parameters | context, {"metadata": keys, "tensors": tensors}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_FILE = scaled("yarn", original_context_length=64)
FREQUENCIES = np.linspace(1.0, 8.0, 8)
AS_FACTORS = rope(
    "longrope", short_factor=FREQUENCIES.tolist(), long_factor=FREQUENCIES.tolist(), attention_factor=1.0,
    original_max_position_embeddings=256, factor=1.0,
)  # fmt: skip
GLOBAL = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 300.0}
PHI3_LONG = longrope(256, 6, partial_rotary_factor=0.75)
GRANITE_LONG = longrope(256, 8)
GRANITE_LONG[1]["metadata"]["rope.scaling.type"] = "longrope"

# Name of a test -> family, what its configuration has beyond the usual, what its file has.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in KINDS},
    **{f"{family}, yarn": (family, YARN, YARN_FILE) for family in ("llama", "qwen2", "qwen3", "olmo2", "smollm3")},
    "yarn with a magnitude": (
        "qwen3",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.7),
        scaled("yarn", original_context_length=64, attn_factor=1.7 / (1 + 0.1 * math.log(4.0))),
    ),
    **{
        f"{family}, linear": (family, rope("linear", factor=4.0), scaled("linear"))
        for family in ("qwen2", "gemma2", "olmo2", "granite", "smollm3")
    },
    "gemma3, linear": (
        "gemma3",
        {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
        scaled("linear"),
    ),
    "granite, factors": ("granite", AS_FACTORS, {"tensors": {"rope_freqs.weight": FREQUENCIES}}),
    "granite, longrope": ("granite", *GRANITE_LONG),
    "phi3, longrope": ("phi3", PHI3_LONG[0], PHI3_LONG[1]),
    "phi3, partial rotation": ("phi3", rope("default", partial_rotary_factor=0.75), {}),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}, {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "granite, tied": ("granite", {"tie_word_embeddings": True}, {}),
    "gemma3, untied": ("gemma3", {"tie_word_embeddings": False}, {}),
    "smollm3, untied": ("smollm3", {"tie_word_embeddings": False}, {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}, {}),
    **{f"{family}, wide heads": (family, {"head_dim": 40}, {}) for family in ("llama", "qwen3", "smollm3")},
    "gemma2, wide heads": ("gemma2", {"head_dim": 40, "query_pre_attn_scalar": 40}, {}),
    "gemma2, default caps": (
        "gemma2",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"metadata": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
    ),
    "gemma2, windows by number": (
        "gemma2",
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        {"metadata": {"attention.sliding_window_pattern": 3}},
    ),
    "gemma2, windows by list": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"metadata": {"attention.sliding_window_pattern": [False, True, False]}},
    ),
    "gemma3, no windows": (
        "gemma3",
        {"layer_types": ["full_attention"] * 7, "sliding_window": 256},
        {"metadata": {"attention.sliding_window": None}},
    ),
    "gemma3, capped": ("gemma3", {"final_logit_softcapping": 3.0}, {"metadata": {"final_logit_softcapping": 3.0}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_transformers_and_llama_cpp(tmp_path: Path, variant: str) -> None:
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    model = load_base(path, compute="fp32").model
    whole = alone(dense, IDS)
    if variant != family:
        assert furthest(whole, alone(random_model(family), IDS)) > 0.1, "the test would not see whether it is there"
    parts = each_alone(lambda ids: alone(dense, ids))
    assert furthest(whole, parts) > 0.1, "documents that see one another would go unnoticed"
    assert furthest(alone(model, IDS), whole) < 1e-4
    assert furthest(packed(model, lengths=(len(IDS),)), whole) < 1e-4
    assert furthest(packed(model), parts) < 1e-4
    assert furthest(cpp(path)(IDS), whole) < 1e-3
    assert furthest(each_alone(cpp(path)), parts) < 1e-3


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", KINDS)
def test_quantised_models(tmp_path: Path, family: str, format: str) -> None:
    """transformers with the weights that the blocks represent gives the same; llama.cpp quantises activations as well.

    It rounds them to 8 bits for each product, about as much as Q8_0 rounds weights: the mean difference of the
    log-probabilities is 0.004 to 0.05 in these models, whose logits are larger than those of trained ones.
    """
    model = random_model(family)
    path = write_family(tmp_path / "model.gguf", family, model, format=format)
    loaded = load_base(path, compute="fp32").model
    expected = alone(rounded(model, format), IDS)
    assert furthest(alone(loaded, IDS), expected) < 1e-4
    assert float((cpp(path)(IDS) - expected).abs().mean()) < 0.06


def test_a_file_of_many_formats(tmp_path: Path) -> None:
    formats = ("Q8_0", "Q5_1", "BF16", "Q4_0", "F32", "Q5_0", "F16", "Q4_1")
    names: list[str] = []

    def each_another(name: str) -> str:
        names.append(name)
        return formats[len(names) % len(formats)]

    path = write_family(tmp_path / "model.gguf", "phi3", random_model("phi3"), format=each_another)
    model = load_base(path, compute="fp32").model
    assert {module.format_name for module in model.modules() if isinstance(module, PackedWeight)} == set(formats)
    assert float((alone(model, IDS) - cpp(path)(IDS)).abs().mean()) < 0.06


@pytest.mark.parametrize("variant", ["phi3, longrope", "granite, longrope"])
def test_each_document_has_its_own_rotary_frequencies(tmp_path: Path, variant: str) -> None:
    """Beside a document that is longer than the original context, a short one is computed as if it were alone."""
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    model = load_base(path, compute="fp32").model
    lengths = (20, 257, 256, 1)
    ids = torch.randint(3, 260, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    expected = each_alone(lambda part: alone(dense, part), ids, lengths)
    assert furthest(packed(model, ids, lengths), expected) < 1e-4
    assert furthest(each_alone(cpp(path), ids, lengths), expected) < 1e-3
    assert furthest(alone(dense, ids[20:120]), expected[20:120]) > 0.1, "a longer text changes its beginning"


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        (family, quantize)
        for family in KINDS
        for quantize in (None, "q8_0")
        if (family, quantize) != ("qwen3moe", "q8_0")
    ],
)
def test_directories_of_hugging_face(tmp_path: Path, family: str, quantize: Any) -> None:
    dense = random_model(family, **({"sliding_window": WINDOW} if family in ("mistral", "phi3") else {}))
    dense.save_pretrained(tmp_path / "model")
    tokenizer = load_base(write_family(tmp_path / "model.gguf", "llama", random_model("llama"))).tokenizer
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_base(tmp_path / "model", compute="fp32", quantize=quantize).model
    if quantize:
        embedding, head = (dense.get_input_embeddings().weight, dense.get_output_embeddings().weight)
        kept = embedding.clone(), head.clone()
        rounded(dense, "Q8_0")
        with torch.no_grad():  # only linear layers are quantised
            embedding.copy_(kept[0])
            head.copy_(kept[1])
    assert furthest(packed(model), each_alone(lambda ids: alone(dense, ids))) < 1e-4


@pytest.mark.parametrize(
    "variant",
    [
        "gemma3, linear",
        "gemma2, windows by list",
        "phi3, longrope",
        "granite, factors",
        "smollm3, yarn",
        "llama, biases",
    ],
)
def test_a_file_unpacked_for_transformers_is_the_same_model(tmp_path: Path, variant: str) -> None:
    """What the file's metadata and factors say is in config.json, where transformers finds it without lorafit."""
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    assert main(["export", str(path), str(tmp_path / "unpacked"), "--format", "safetensors"]) == 0
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked", dtype=torch.float32)
    assert furthest(alone(unpacked, IDS), alone(dense, IDS)) < 1e-4


WINDOWED = {
    # llama.cpp does not look at these families' windows; transformers, which trained models are published for, does.
    "mistral": ("mistral", {"sliding_window": WINDOW}, {"metadata": {"attention.sliding_window": WINDOW}}),
    "phi3": ("phi3", {"sliding_window": WINDOW}, {}),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_that_llama_cpp_ignores_are_kept(tmp_path: Path, family: str) -> None:
    _, config, options = WINDOWED[family]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    model = load_base(path, compute="fp32").model
    assert furthest(alone(model, IDS), alone(dense, IDS)) < 1e-4
    assert furthest(packed(model), each_alone(lambda ids: alone(dense, ids))) < 1e-4
    assert furthest(alone(model, IDS[:WINDOW]), cpp(path)(IDS[:WINDOW])) < 1e-3
    assert furthest(alone(model, IDS), cpp(path)(IDS)) > 0.1
