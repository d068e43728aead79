"""Bases that are quantised while they are loaded: which bits, what is left alone, what is said, what is refused."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorafit.errors import ConfigError, LorafitError, ModelError
from lorafit.models.load import load, load_base
from lorafit.models.quantizing import quantized
from lorafit.modules import PackedLinear
from lorafit.modules.size import measure_size
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import write_tiny_llama

IDS = torch.randint(3, 260, (1, 40), generator=torch.Generator().manual_seed(0))
QUANTIZE = ("nf4", "fp4", "q4_1", "q5_1", "q8_0")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model"
    write_tiny_directory(path)
    return path


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def rounded(weight: Tensor, how: str) -> Tensor:
    """What the makers of a format make of a weight."""
    if how in ("nf4", "fp4"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*quantize_4bit(weight, quant_type=how, compress_statistics=True))
    kind = gguf.GGMLQuantizationType[how.upper()]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


@pytest.mark.parametrize("how", QUANTIZE)
def test_linear_layers_are_those_of_the_formats_makers(directory: Path, how: str) -> None:
    base = load_base(directory, compute="fp32", quantize=how)  # type: ignore[arg-type]
    weights = load_file(directory / "model.safetensors")
    layers = packed_layers(base.model)
    assert len(layers) == 14, "all but the head, which is tied to the embedding"
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"]
        result, expected = layer.packed.dense(torch.float32), rounded(weight, how)
        if how in ("q4_1", "q5_1"):
            # The search for scale and offset does better than the makers' rounding, by what tests of it say.
            assert (result - weight).square().sum() <= (expected - weight).square().sum()
        else:
            assert torch.equal(result, expected), name
    assert (base.quantize, base.kept, base.second_quantization) == (how, {}, None)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"]
)
def test_every_family_computes_what_transformers_computes_with_the_rounded_weights(tmp_path: Path, family: str) -> None:
    dense = write_tiny_directory(tmp_path / "model", family)
    base = load_base(tmp_path / "model", compute="fp32", quantize="q8_0")
    with torch.no_grad():
        for name, layer in packed_layers(base.model).items():
            dense.get_submodule(name).weight.copy_(layer.packed.dense(torch.float32))  # type: ignore[operator, union-attr]
    # The same float32 products in another order, two layers deep, on logits that reach 10.
    torch.testing.assert_close(logits(base.model), logits(dense), rtol=0, atol=1e-4)
    assert len(packed_layers(base.model)) == (8 if family == "phi3" else 14)


def test_the_same_weights_give_the_same_bits(directory: Path, tmp_path: Path) -> None:
    """In one file or in several, in one thread or in two."""
    first = load_base(directory, compute="fp32", quantize="nf4").model
    sharded = shutil.copytree(directory, tmp_path / "sharded")
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(sharded, max_shard_size="200KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        second = load_base(sharded, compute="fp32", quantize="nf4").model
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits(first), logits(second))
    for name, layer in packed_layers(first).items():
        other = packed_layers(second)[name].packed
        assert torch.equal(layer.packed.blocks, other.blocks)
        assert layer.packed.constants is not None
        assert torch.equal(layer.packed.constants, other.constants)


def test_a_large_matrix_has_the_same_bits_in_any_number_of_threads() -> None:
    """From 32,768 blocks on torch adds up in several threads, and then rounds a mean otherwise."""
    weights = torch.randn(4375, 1024, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(quantized(weights, "nf4", "w", "here"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].blocks, other.blocks)
        assert torch.equal(results[0].constants, other.constants)  # type: ignore[arg-type]


def test_heads_that_are_not_tied_and_embeddings_are_left_alone(tmp_path: Path) -> None:
    dense = write_tiny_directory(tmp_path / "model", tie_word_embeddings=False)
    model = load_base(tmp_path / "model", compute="fp32", quantize="nf4").model
    assert isinstance(model.lm_head, nn.Linear)
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_a_width_that_is_not_whole_blocks_stays_as_it_is_and_is_named(tmp_path: Path) -> None:
    """96 is three blocks of 32, and one and a half of 64; 100 is neither."""
    write_tiny_directory(tmp_path / "half", intermediate_size=96)
    base = load_base(tmp_path / "half", compute="fp32", quantize="nf4")
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert base.kept == dict.fromkeys(names, "its rows of 96 weights are not whole blocks of 64")
    assert all(isinstance(base.model.get_submodule(name), nn.Linear) for name in names)
    assert len(packed_layers(base.model)) == 12
    assert load_base(tmp_path / "half", quantize="q4_1").kept == {}
    write_tiny_directory(tmp_path / "odd", intermediate_size=100)
    assert load_base(tmp_path / "odd", quantize="q4_1").kept.keys() == set(names)
    assert torch.isfinite(logits(base.model)).all()


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_quantisation_that_fits_no_layer_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "directory":
        write_tiny_directory(path, hidden_size=80, intermediate_size=112)
    else:
        write_tiny_llama(path, hidden=96, intermediate=96, format="F16", embedding_format="F16")
    with pytest.raises(
        ConfigError, match=r"--quantize nf4 has no effect on .*model.layers.0.self_attn.q_proj: its rows"
    ):
        load_base(path, quantize="nf4")


def test_bits_per_parameter_are_measured(tmp_path: Path) -> None:
    """Of double-quantised blocks 4.125 bits, a scale for 256 of them, and a mean for each tensor; of Q4_1 5 bits."""
    dense = write_tiny_directory(tmp_path / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    tensors = [weight for name, weight in dense.named_parameters() if name.endswith("proj.weight")]
    count = sum(weight.numel() for weight in tensors)
    scales = sum(-(-weight.numel() // (64 * 256)) for weight in tensors)
    size = measure_size(load_base(tmp_path / "model", compute="fp32", quantize="nf4").model)
    assert size.quantized_bits_per_parameter == (4.125 * count + 32 * (scales + len(tensors))) / count
    assert round(size.quantized_bits_per_parameter, 3) == 4.127
    rest = sum(parameter.numel() for parameter in dense.parameters()) - count
    assert size.bits_per_parameter == (size.quantized_bits_per_parameter * count + 32 * rest) / (count + rest)
    assert size.nbytes * 8 == size.bits_per_parameter * (count + rest)
    size = measure_size(load_base(tmp_path / "model", compute="bf16", quantize="q4_1").model)
    assert size.quantized_bits_per_parameter == 5.0
    size = measure_size(load_base(tmp_path / "model", compute="bf16").model)
    assert (size.bits_per_parameter, size.quantized_bits_per_parameter) == (16.0, None)


@pytest.mark.parametrize("embedding", ["F16", "Q4_0"])
def test_a_full_precision_gguf_is_quantised_too(tmp_path: Path, embedding: str) -> None:
    """Whatever its embedding and its head, which stay as they are, lie in."""
    tiny = write_tiny_llama(tmp_path / "half.gguf", format="F16", embedding_format=embedding)
    base = load_base(tiny.path, compute="fp32", quantize="q8_0")
    layers = packed_layers(base.model)
    assert layers["lm_head"].packed.format_name == embedding
    for name, layer in layers.items():
        if name != "lm_head":
            expected = rounded(torch.from_numpy(tiny.weights[f"{name}.weight"]), "q8_0")
            assert torch.equal(layer.packed.dense(torch.float32), expected), name


def test_what_is_quantised_already_is_refused_with_a_remedy(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"tiny\.gguf is quantised already; .*lorafit export .*--format safetensors"):
        load(tmp_path / "tiny.gguf", quantize="nf4")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError, match="says itself how its base is quantised"):
        load(tmp_path / "run", quantize="nf4")


def damaged(path: Path, name: str, value: Tensor | None) -> None:
    weights = load_file(path / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    save_file(weights, path / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (UP, torch.full((192, 128), torch.nan), f"{UP}: some weights are NaN or infinite"),
        ("model.norm.weight", torch.full((128,), torch.inf), "model.norm.weight holds numbers that are not finite"),
        (UP, torch.full((192, 128), 1e30), f"{UP}: its weights of up to 1e\\+30 are too large for Q8_0"),
        (UP, torch.ones(192, 64), rf"{UP} has the shape \[192, 64\], not \[192, 128\]"),
        (UP, None, f"{UP} is missing"),
        ("model.layers.0.self_attn.sinks", torch.zeros(3), "sinks is not a weight of this architecture"),
        ("lm_head.weight", torch.ones(320, 128), "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_checkpoints_that_are_not_what_they_should_be(
    directory: Path, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    damaged(path, name, value)
    with pytest.raises(ModelError, match=message) as caught:
        load_base(path, quantize="q8_0")
    assert str(path) in str(caught.value)


def test_a_head_that_is_there_although_it_is_tied(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    damaged(path, "lm_head.weight", load_file(path / "model.safetensors")["model.embed_tokens.weight"])
    damaged(path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(16))  # as old checkpoints have it
    load_base(path, quantize="q8_0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not say which file holds which tensor"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "does not say which file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors is not a usable safetensors file"),
        ('{"weight_map": {}}', "does not say which file"),
        ('{"weight_map": {"a": 3}}', "does not say which file"),
        (None, "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_indexes_that_lead_nowhere(directory: Path, tmp_path: Path, content: str | None, message: str) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    (path / "model.safetensors").rename(path / "other.safetensors")
    if content is not None:
        (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(LorafitError, match=message):
        load_base(path, quantize="q8_0")


def test_truncated_files_are_refused(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    content = (path / "model.safetensors").read_bytes()
    for length in (0, 4, 1000, len(content) - 1):
        (path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(LorafitError, match=r"model\.safetensors is not a usable safetensors file"):
            load_base(path, quantize="nf4")


def test_settings_for_generating_come_along(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    assert load_base(path, quantize="nf4").model.generation_config.temperature == 0.25
