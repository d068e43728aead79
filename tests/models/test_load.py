"""Loading GGUF files: logits against transformers and llama.cpp, and every kind of model that must be refused.

Tolerance of float32 logits: sums of up to a hundred products, in another order, through two layers, differ by some 1e-6
of logits that reach 10. A wrong row, factor or epsilon changes them by 1e-2 and more, which each test that stands for a
feature checks as well.
"""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorafit.containers.gguf import GGUFFile
from lorafit.data.chat import render_prompt
from lorafit.errors import ConfigError, ContainerError, FormatError, MissingFileError, ModelError
from lorafit.models.load import load, load_base
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight
from tests.oracles.llama_gguf import random_llama, write_llama
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

ATOL = 5e-5
IDS = torch.randint(3, 260, (1, 50), generator=torch.Generator().manual_seed(0))
FACTORS = np.linspace(1.0, 8.0, 8)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    """[T, vocabulary]."""
    return model(input_ids=ids, use_cache=False).logits[0]


def cpp_logits(path: Path) -> Tensor:
    return torch.from_numpy(LlamaCppOracle(path).logits(IDS[0].tolist()))


def assert_close(result: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


def packed_weights(model: torch.nn.Module) -> dict[str, PackedWeight]:
    return {module.name: module for module in model.modules() if isinstance(module, PackedWeight)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


# --- What is computed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("format", "embedding"), [("Q4_1", "Q8_0"), ("Q8_0", "Q4_1"), ("F16", "F16"), ("F32", "F32")])
def test_logits_of_every_format(tmp_path: Path, format: Any, embedding: Any, tied: bool) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format=format, embedding_format=embedding, tied=tied)
    dense = tiny.dense()
    assert_close(logits(load_base(tiny.path, compute="fp32").model), logits(dense))
    # bfloat16 rounds at every operation; what lorafit makes of it must be no worse than what transformers does.
    error = logits(load_base(tiny.path, compute="bf16").model).float() - logits(dense)
    usual = logits(tiny.dense().to(torch.bfloat16)).float() - logits(dense)
    assert error.norm() < 1.3 * usual.norm()


def scaled_rotary(model: LlamaForCausalLM) -> LlamaForCausalLM:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.from_numpy(FACTORS).float()
    return model


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
VARIANTS: dict[str, tuple[Callable[[], LlamaForCausalLM], dict[str, Any]]] = {
    "untied head": (random_llama, {}),
    "tied head": (lambda: random_llama(tie_word_embeddings=True), {}),
    "a key head for each head": (lambda: random_llama(num_key_value_heads=4), {}),
    "one key head": (lambda: random_llama(num_key_value_heads=1), {}),
    "heads wider than their share": (lambda: random_llama(head_dim=24), {}),
    "biases in attention": (lambda: random_llama(attention_bias=True), {}),
    "another base frequency and epsilon": (
        lambda: random_llama(rope_parameters={"rope_type": "default", "rope_theta": 300.0}, rms_norm_eps=0.1),
        {},
    ),
    "rotary factors": (
        lambda: scaled_rotary(random_llama()),
        {"tensors": {"rope_freqs.weight": FACTORS}},
    ),
    "linear scaling": (
        lambda: random_llama(rope_parameters=LINEAR),
        {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
    ),
    "a scaling factor without a type": (
        lambda: random_llama(rope_parameters=LINEAR),
        {"metadata": {"llama.rope.scaling.factor": 4.0}},
    ),
    "a scaling factor that is switched off": (
        random_llama,
        {"metadata": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant_are_those_of_transformers_and_llama_cpp(tmp_path: Path, variant: str) -> None:
    make, options = VARIANTS[variant]
    dense = make()
    path = write_llama(tmp_path / "model.gguf", dense, **options)
    result = logits(load_base(path, compute="fp32").model)
    assert_close(result, logits(dense))
    assert_close(result, cpp_logits(path))
    plain = logits(random_llama())
    if variant not in ("untied head", "a scaling factor that is switched off"):
        assert (result - plain).abs().max() > 1e-2, "the test would not see whether the feature is there"


def test_half_precision_file_agrees_with_llama_cpp(tmp_path: Path) -> None:
    # llama.cpp rounds the activations to half precision as well: 2⁻¹¹ of each, some 1e-2 of logits that reach 10.
    path = write_llama(tmp_path / "model.gguf", random_llama(), format="F16")
    assert_close(logits(load_base(path, compute="fp32").model), cpp_logits(path), atol=2e-2)


def test_smollm2_equals_the_dense_model(smollm2_path: Path) -> None:
    """The embedded model, with its 211 matrices unpacked by gguf-py into transformers' own layers."""
    file = GGUFFile.open(smollm2_path)  # gguf-py needs seconds to read it, and the reader has tests of its own
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, attn_implementation="eager",
    )  # fmt: skip
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    with torch.device("meta"):
        dense = LlamaForCausalLM(config)
    state = {}
    for hf_name, parameter in dense.named_parameters():
        info = file.tensors[str(names.get_name(hf_name, try_suffixes=(".weight",)))]
        array = gguf.quants.dequantize(file.blocks(info.name).numpy(), gguf.GGMLQuantizationType[info.format])
        if "q_proj" in hf_name or "k_proj" in hf_name:
            array = array.reshape(-1, 32, 2, 576).swapaxes(1, 2)
        state[hf_name] = torch.from_numpy(np.array(array).reshape(parameter.shape))
    dense.load_state_dict(state, strict=False, assign=True)
    dense.tie_weights()
    dense.model.rotary_emb = type(dense.model.rotary_emb)(config)
    base = load_base(smollm2_path, compute="fp32")
    ids = torch.tensor([base.tokenizer.encode("The quick brown fox jumps over the lazy dog, and 12 of its friends.")])
    expected = logits(dense.eval(), ids)
    # Thirty layers of sums over 576 and 1536 products: 7e-5 where it was written, of logits that reach 31.
    assert_close(logits(base.model, ids), expected, atol=3e-4)
    assert base.model.config.max_position_embeddings == 8192
    assert (base.tokenizer.eos_token_id, base.model.config.eos_token_id) == (2, 2)


def test_decoding_with_a_cache_equals_the_dense_model(tiny: TinyLlama) -> None:
    """One token at a time, so through the fused products."""
    base = load_base(tiny.path, compute="fp32")
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    prompt = IDS[:, :5]
    assert torch.equal(base.model.generate(prompt, **options), tiny.dense().generate(prompt, **options))


# --- How it lies in memory


def test_all_matrices_are_views_of_the_file(tiny: TinyLlama) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped where")
    model = load_base(tiny.path).model
    lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(str(tiny.path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    packed = packed_weights(model)
    assert set(packed) == {tensor.name for tensor in gguf.GGUFReader(tiny.path).tensors if len(tensor.shape) == 2}
    for weight in packed.values():
        first, last = weight.blocks.data_ptr(), weight.blocks.data_ptr() + weight.blocks.numel()
        assert any(start <= first and last <= end for start, end in ranges), f"{weight.name} was copied"


def test_the_file_is_never_written_to(tiny: TinyLlama) -> None:
    before = tiny.path.read_bytes()
    model = load_base(tiny.path, compute="fp32").model
    for weight in packed_weights(model).values():
        weight.blocks.zero_()
    for parameter in model.parameters():
        parameter.zero_()
    assert tiny.path.read_bytes() == before
    assert_close(logits(load_base(tiny.path, compute="fp32").model), logits(tiny.dense()))


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_loaded_model_is_made_of(tmp_path: Path, tied: bool) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", tied=tied)
    base = load_base(tiny.path, compute="bf16")
    model = base.model
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert not [name for name, tensor in tensors.items() if tensor.requires_grad]
    assert {name for name, _ in model.named_parameters()} == {name for name in tiny.weights if "norm" in name}
    assert {p.dtype for p in model.parameters()} == {base.compute} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]


def test_a_token_that_the_model_lacks_is_an_error(tiny: TinyLlama) -> None:
    model = load_base(tiny.path).model
    for token in (320, -1):
        with pytest.raises(IndexError, match=f"no row {token} in a weight of 320 rows"):
            model(input_ids=torch.tensor([[5, token]]))


# --- What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"general.architecture": "qwen9"}}, "architecture 'qwen9' is not supported; lorafit knows llama"),
        ({"metadata": {"llama.block_count": None}}, "the metadata lack llama.block_count"),
        ({"metadata": {"llama.block_count": 3}}, r"model.layers.2.\S+ is missing.* and 4 more"),
        ({"metadata": {"llama.block_count": 1}}, r"'blk.1.\S+' is not a tensor of this architecture.* and 4 more"),
        ({"metadata": {"llama.block_count": 10**9}}, "claims 1000000000 layers, but holds 21 tensors"),
        ({"metadata": {"llama.feed_forward_length": 95}}, r"ffn_down.weight has the shape \[64, 96\], not \[64, 95\]"),
        ({"metadata": {"llama.embedding_length": 2**30}}, "token_embd.weight has the shape"),
        ({"metadata": {"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 4.0}}, "scaling 'dynamic'"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"tensors": {"token_embd.weight": None}}, "token_embd.weight is missing"),
        ({"tensors": {"output_norm.weight": None, "blk.0.attn_q.weight": None}}, "q_proj.weight is missing; .*norm"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4)}}, "'blk.0.attn_sinks.weight' is not a tensor"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64)}}, "k_proj.bias is missing"),
        ({"tensors": {"blk.1.attn_q.bias": np.ones(64)}}, "'blk.1.attn_q.bias' is not a tensor"),
        ({"tensors": {"output.weight": np.ones((64, 64))}}, r"output.weight has the shape \[64, 64\], not \[264, 64\]"),
        ({"tensors": {"output_norm.weight": np.ones((2, 32))}}, "output_norm.weight has the shape"),
        ({"tensors": {"token_embd.weight": np.ones((300, 64))}}, "has 264 tokens, but token_embd.weight is for 300"),
        ({"tensors": {"token_embd.weight": np.ones((100, 64))}}, "has 264 tokens, but token_embd.weight is for 100"),
        ({"tensors": {"rope_freqs.weight": np.ones(7)}}, "rope_freqs.weight must be 8 positive factors"),
        ({"tensors": {"rope_freqs.weight": np.ones(1)}}, "rope_freqs.weight must be 8 positive factors"),
        ({"tensors": {"rope_freqs.weight": np.zeros(8)}}, "rope_freqs.weight must be 8 positive factors"),
    ],
)
def test_models_that_are_not_what_they_say_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_llama(tmp_path / "model.gguf", random_llama(), **options)
    with pytest.raises(ModelError, match=message) as caught:
        load_base(path)
    assert str(path) in str(caught.value)


def test_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", random_llama(hidden_size=256, intermediate_size=256), format="TQ2_0")
    with pytest.raises(FormatError, match=r"model.gguf: tensor '.*weight' has TQ2_0 \(type 35\); lorafit reads"):
        load_base(path)


@pytest.mark.parametrize(
    ("name", "at", "code", "number"),
    [
        ("blk.0.ffn_up.weight", 20, "<e", float("nan")),
        ("blk.1.attn_q.weight", 22, "<e", float("inf")),
        ("token_embd.weight", 34, "<e", float("-inf")),
        ("output_norm.weight", 4, "<f", float("nan")),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    tiny: TinyLlama, tmp_path: Path, name: str, at: int, code: str, number: float
) -> None:
    content = bytearray(tiny.path.read_bytes())
    struct.pack_into(code, content, GGUFFile.open(tiny.path).tensors[name].offset + at, number)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ContainerError, match=f"'{name}' holds numbers that are not finite"):
        load_base(path)


def header(tiny: TinyLlama) -> tuple[bytearray, list[int]]:
    """The file's bytes, and the places in its header that are not the vocabulary, which has a checker of its own."""
    content = bytearray(tiny.path.read_bytes())
    end = min(info.offset for info in GGUFFile.open(tiny.path).tensors.values())
    tokens, after = content.index(b"tokenizer.ggml.tokens"), content.index(b"tokenizer.ggml.bos_token_id")
    return content, [*range(4, tokens), *range(after, end)]


def load_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        load_base(path, compute="fp32")
    except (ContainerError, FormatError, ModelError) as error:
        assert str(path) in str(error)  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_corrupted_models_are_loaded_or_refused(tiny: TinyLlama, data: st.DataObject) -> None:
    content, places = header(tiny)
    for at, byte in data.draw(
        st.lists(st.tuples(st.sampled_from(places), st.integers(0, 255)), min_size=1, max_size=3)
    ):
        content[at] = byte
    load_or_refuse(tiny.path.with_name("corrupted.gguf"), bytes(content))


def test_models_with_extreme_numbers_are_loaded_or_refused(tiny: TinyLlama) -> None:
    generator = random.Random(0)
    extremes = [struct.pack("<I", number) for number in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)]
    extremes += [struct.pack("<f", number) for number in (float("nan"), float("inf"), -1.0)]
    for _ in range(100):
        content, places = header(tiny)
        at = generator.choice(places)
        content[at : at + 4] = generator.choice(extremes)
        load_or_refuse(tiny.path.with_name("extreme.gguf"), bytes(content))


def test_truncated_models_are_refused(tiny: TinyLlama) -> None:
    content = tiny.path.read_bytes()
    # Padding behind the last tensor may be missing.
    needed = max(info.offset + info.nbytes for info in GGUFFile.open(tiny.path).tensors.values())
    path = tiny.path.with_name("truncated.gguf")
    for length in [*range(0, 200, 7), *random.Random(0).sample(range(needed), 60), needed - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ContainerError, match=r"truncated\.gguf"):
            load_base(path)
    path.write_bytes(content[:needed])
    assert_close(logits(load_base(path, compute="fp32").model), logits(tiny.dense()))


# --- Names, and what is nothing


def test_what_is_not_there_names_what_could_be(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere: no such model; give a .gguf file, .*smollm2-135m"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="compute is 'int8', but must be one of auto, bf16, fp32"):
        load_base(tmp_path, compute="int8")
    with pytest.raises(ModelError, match="neither a model nor a run"):
        load_base(tmp_path)
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ContainerError, match="not a GGUF file"):
        load_base(tmp_path / "model.gguf")


def test_load_gives_the_model_and_its_tokenizer(tiny: TinyLlama) -> None:
    model, tokenizer = load(tiny.path, compute="fp32")
    assert_close(logits(model), logits(tiny.dense()))
    assert tokenizer.encode("<|im_start|>the cat")[0] == 1
    assert tokenizer.chat_template


def test_a_missing_chat_template_matters_only_when_a_chat_is_rendered(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", random_llama(), metadata={"general.name": "a base model"})
    content = path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templato")
    path.write_bytes(content)
    _, tokenizer = load(path)
    assert tokenizer.encode("the cat")
    with pytest.raises(ModelError, match="chat template"):
        render_prompt([{"role": "user", "content": "Hello"}], tokenizer)
