"""What attaching covers, against PEFT's own choice of layers; and that it can be switched off, and fails whole."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.models.load import load_base
from lorafit.modules import (
    LoRALinear,
    PackedLinear,
    PackedWeight,
    Promotion,
    QALoRALinear,
    adapter_modules,
    adapters_disabled,
    attach,
)
from tests.oracles.adapted import fill
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

# PEFT asks transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.tensor([list(range(40, 60))])
HIDDEN, INTERMEDIATE, KV, LAYERS = 128, 192, 64, 2
SHAPES = {  # of each block of the tiny models: (out_dim, in_dim)
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    path = tmp_path_factory.mktemp("tied") / "tiny.gguf"
    return write_tiny_llama(path, hidden=HIDDEN, intermediate=INTERMEDIATE, layers=LAYERS)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    path = tmp_path_factory.mktemp("untied") / "tiny.gguf"
    return write_tiny_llama(path, hidden=HIDDEN, intermediate=INTERMEDIATE, layers=LAYERS, tied=False)


def loaded(tiny: TinyLlama) -> nn.Module:
    return load_base(tiny.path, compute="fp32").model


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [LoRA(rank=4), LoRA(rank=4, dropout=0.5, scaling="plain"), QALoRA(rank=4)])
def test_the_model_starts_as_the_base_to_the_last_bit(tied: TinyLlama, config: AdapterConfig, compute: str) -> None:
    model = load_base(tied.path, compute=compute).model  # type: ignore[arg-type]
    with torch.no_grad():
        before = model(TOKENS).logits
        attach(model, config)
        assert torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model.train()(TOKENS).logits, before)  # through the autograd functions


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("config", [LoRA(rank=3), QALoRA(rank=3)])
def test_coverage_accounts_for_every_matrix(which: str, config: AdapterConfig, request: pytest.FixtureRequest) -> None:
    tiny: TinyLlama = request.getfixturevalue(which)
    model = loaded(tiny)
    coverage = attach(model, config)
    expected = {}
    for i in range(LAYERS):
        for name, (out_dim, in_dim) in SHAPES.items():
            columns = in_dim // 32 if config.method == "qalora" else in_dim
            expected[f"model.layers.{i}.{name}"] = 3 * (columns + out_dim)
    assert coverage.wrapped == expected
    assert coverage.trainable_parameters == sum(expected.values())
    assert coverage.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert coverage.total_parameters == sum(weight.size for weight in tiny.weights.values())
    assert coverage.method == config.method
    assert coverage.frozen.keys() == {"lm_head", "model.embed_tokens"}
    assert "output head" in coverage.frozen["lm_head"]
    assert "embedding" in coverage.frozen["model.embed_tokens"]
    assert coverage.formats == {**dict.fromkeys(expected, "Q4_1"), **dict.fromkeys(coverage.frozen, "Q8_0")}
    assert set(adapter_modules(model)) == set(expected)
    for name, module in adapter_modules(model).items():
        assert sum(p.numel() for p in module.adapter_parameters().values()) == expected[name]
        assert not any(p.requires_grad for p in module.base.parameters())


@pytest.mark.parametrize(
    "targets",
    [
        "q_proj",
        "q_proj,v_proj",
        " q_proj , mlp.down_proj ",
        "layers.1.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj,up_proj",
        "1.mlp.up_proj",
        r".*layers\.0\.(mlp|self_attn)\.[a-z_]*_proj",
        r".*\.(q|k)_proj",
        "all-linear",
        "lm_head,o_proj",
        "lm_head",
    ],
)
def test_targets_mean_what_they_mean_to_peft(untied: TinyLlama, targets: str) -> None:
    names = [name.strip() for name in targets.split(",")]
    is_list = targets != "all-linear" and not any(sign in targets for sign in "*()[]\\")
    theirs = get_peft_model(untied.dense(), LoraConfig(r=2, target_modules=names if is_list else targets))
    wrapped = {n for n, module in theirs.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    coverage = attach(loaded(untied), LoRA(rank=2, targets=targets))
    assert set(coverage.wrapped) == wrapped
    assert len(coverage.wrapped) + len(coverage.frozen) == LAYERS * len(SHAPES) + 2


def test_a_name_does_not_match_the_middle_or_the_end_of_a_word(untied: TinyLlama) -> None:
    for targets in ("proj", "self_attn", "_proj", "model"):
        with pytest.raises(AdapterError, match=f"no linear layer matches {targets}; there are down_proj, .*v_proj"):
            attach(loaded(untied), LoRA(targets=targets))


def test_every_name_must_match(untied: TinyLlama) -> None:
    model = loaded(untied)
    with pytest.raises(AdapterError, match="--targets: no linear layer matches v_porj, nothing; "):
        attach(model, LoRA(targets="q_proj,v_porj,nothing"))
    with pytest.raises(AdapterError, match=r"matches \.\*layers\\\.9"):
        attach(model, LoRA(targets=r".*layers\.9\..*"))
    with pytest.raises(ConfigError, match=r"'\(q_proj' is neither names nor a regular expression"):
        attach(model, LoRA(targets="(q_proj"))
    assert not adapter_modules(model)


def test_attaching_twice_is_refused(tied: TinyLlama) -> None:
    model = loaded(tied)
    attach(model, LoRA(rank=2, targets="q_proj"))
    for config in (LoRA(rank=2, targets="v_proj"), QALoRA(rank=2)):
        with pytest.raises(AdapterError, match="has adapters already"):
            attach(model, config)


def test_a_rank_that_one_layer_cannot_take_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", hidden=128, intermediate=64, layers=1)
    model = loaded(tiny)
    with pytest.raises(AdapterError, match=r"blk\.0\.ffn_down\.weight: rank 3 exceeds the 2 blocks"):
        attach(model, QALoRA(rank=3))
    assert not adapter_modules(model)
    attach(model, QALoRA(rank=2))


def test_adapters_are_in_the_mode_of_the_model(tied: TinyLlama) -> None:
    model = loaded(tied)
    attach(model, LoRA(rank=2, dropout=0.5))
    fill(model)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)  # a loaded model is in evaluation mode
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_qalora_leaves_what_has_no_offsets_and_says_so(untied: TinyLlama, tmp_path: Path) -> None:
    coverage = attach(loaded(untied), QALoRA(rank=2, targets="q_proj,lm_head"))
    assert len(coverage.wrapped) == LAYERS
    assert coverage.frozen["lm_head"] == "Q8_0 has no block offsets"
    assert coverage.frozen["model.layers.0.self_attn.k_proj"] == "not among the targets"
    for block_format in ("Q8_0", "F16"):
        base = loaded(write_tiny_llama(tmp_path / f"{block_format}.gguf", format=block_format))  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match=rf"qalora \({block_format} has no block offsets\).*--method lora"):
            attach(base, QALoRA(rank=2))
    with pytest.raises(AdapterError, match=r"qalora \(not packed\)"):
        attach(untied.dense(), QALoRA(rank=2))


def test_qlora_is_lora_beside_a_quantised_base(tied: TinyLlama, tmp_path: Path) -> None:
    states = []
    for config in (LoRA(rank=3, scaling="rslora"), QLoRA(rank=3, scaling="rslora")):
        model = loaded(tied)
        torch.manual_seed(0)
        assert attach(model, config).method == config.method
        for module in adapter_modules(model).values():
            module.adapter_parameters()["lora_B"].data.normal_()
        with torch.no_grad():
            states.append(model(TOKENS).logits)
    assert torch.equal(*states)
    for base in (tied.dense(), loaded(write_tiny_llama(tmp_path / "half.gguf", format="F16"))):
        with pytest.raises(AdapterError, match=r"no target layer is quantised: .*--quantize nf4"):
            attach(base, QLoRA(rank=3))


def test_plain_lora_on_what_has_no_offsets(tmp_path: Path) -> None:
    mixed = write_tiny_llama(tmp_path / "mixed.gguf", hidden=128, formats={"ffn_down": "Q8_0", "0.attn_v": "F16"})
    model = loaded(mixed)
    with torch.no_grad():
        before = model(TOKENS).logits
    coverage = attach(model, QALoRA(rank=2, alpha=6.0, frozen_tensors="lora"))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)
    down = {f"model.layers.{i}.mlp.down_proj": "Q8_0 has no block offsets" for i in range(LAYERS)}
    assert coverage.beside == {**down, "model.layers.0.self_attn.v_proj": "F16 has no block offsets"}
    assert coverage.frozen.keys() == {"lm_head", "model.embed_tokens"}
    for name, module in adapter_modules(model).items():
        assert isinstance(module, LoRALinear if name in coverage.beside else QALoRALinear)
        assert module.scale == 3.0
        assert coverage.wrapped[name] == sum(p.numel() for p in module.adapter_parameters().values())
    assert coverage.fate("model.layers.1.mlp.down_proj") == "trained by plain LoRA: Q8_0 has no block offsets"
    assert coverage.fate("model.layers.1.mlp.up_proj") == "trained"
    left = attach(loaded(mixed), QALoRA(rank=2))
    assert left.frozen.items() >= coverage.beside.items()
    assert not left.beside


def test_promotion_is_told_for_each_tensor(tmp_path: Path) -> None:
    formats = {"attn_q": "Q4_0", "0.attn_k": "Q4_K", "1.attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q5_0"}
    mixed = write_tiny_llama(tmp_path / "mixed.gguf", hidden=256, intermediate=256, formats=formats)  # type: ignore[arg-type]
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(mixed.path).tensors}
    model = loaded(mixed)
    coverage = attach(model, QALoRA(rank=2))
    expected = {}
    for i in range(LAYERS):
        for name, kind, source, rows in (
            ("self_attn.q_proj", "attn_q", "Q4_0", 256),
            ("self_attn.k_proj", "attn_k", ("Q4_K", "Q5_K")[i], 128),
            ("self_attn.o_proj", "attn_output", "Q5_0", 256),
        ):
            target, block = ("Q4_1", 20) if source.startswith("Q4") else ("Q5_1", 24)
            before, after = sizes[f"blk.{i}.{kind}.weight"], rows * 256 // 32 * block
            exact = not source.endswith("K")
            expected[f"model.layers.{i}.{name}"] = Promotion(source, target, exact, before, after)
    assert coverage.promoted == expected
    # Half a bit for each weight.
    weights = LAYERS * (256 + 128 + 256) * 256
    assert coverage.promotion_bytes == weights // 16
    assert coverage.promoted_memory_bytes == sum(p.target_bytes for p in expected.values())
    assert coverage.fate("model.layers.0.self_attn.k_proj") == "trained, promoted from Q4_K to Q4_1, rounded"
    assert coverage.fate("model.layers.0.self_attn.o_proj") == "trained, promoted from Q5_0 to Q5_1, exact"
    assert coverage.fate("model.layers.0.mlp.up_proj") == "trained"
    assert coverage.fate("model.layers.1.self_attn.v_proj") == "frozen: Q6_K has no block offsets"
    assert coverage.formats["model.layers.0.self_attn.k_proj"] == "Q4_K"
    with torch.no_grad():
        base = loaded(mixed)(TOKENS).logits
        assert not torch.equal(model(TOKENS).logits, base)  # K-quants were rounded
        with adapters_disabled(model):
            assert torch.equal(model(TOKENS).logits, base)


def test_plain_lora_where_nothing_needs_it_is_refused(tied: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--frozen-tensors lora has no effect"):
        attach(loaded(tied), QALoRA(rank=2, frozen_tensors="lora"))
    without = write_tiny_llama(tmp_path / "q8.gguf", format="Q8_0")
    with pytest.raises(AdapterError, match=r"no target layer can take qalora \(Q8_0 has no block offsets\)"):
        attach(loaded(without), QALoRA(rank=2, frozen_tensors="lora"))


def test_any_module_can_be_adapted() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.ModuleDict({"inner": nn.Linear(6, 4, bias=False)})["inner"])
    coverage = attach(model, LoRA(rank=2))
    assert coverage.wrapped == {"0": 2 * (8 + 6), "2": 2 * (6 + 4)}
    assert coverage.total_parameters == 8 * 6 + 6 + 6 * 4
    assert coverage.formats == {"0": "float32", "2": "float32"}
    with pytest.raises(AdapterError, match="no linear layer matches all-linear"):
        attach(nn.Sequential(nn.ReLU()), LoRA())


def test_disabled_adapters_leave_the_base_and_come_back(tied: TinyLlama) -> None:
    for config in (LoRA(rank=2, dropout=0.5), QALoRA(rank=2)):
        model = loaded(tied)
        with torch.no_grad():
            before = model(TOKENS).logits
        attach(model, config)
        fill(model)
        first = next(iter(adapter_modules(model).values()))
        first.enabled = False  # a state of its own, to be restored
        with torch.no_grad():
            partly = model(TOKENS).logits
            assert not torch.equal(partly, before)
            with adapters_disabled(model):
                with adapters_disabled(model):
                    assert torch.equal(model(TOKENS).logits, before)
                assert torch.equal(model(TOKENS).logits, before)
            assert torch.equal(model(TOKENS).logits, partly)
            with pytest.raises(RuntimeError, match="stop"), adapters_disabled(model):
                raise RuntimeError("stop")
            assert torch.equal(model(TOKENS).logits, partly)
            first.enabled = True
            assert not torch.equal(model(TOKENS).logits, partly)


def test_shared_blocks_count_once() -> None:
    blocks = torch.from_numpy(gguf.quants.quantize(np.ones((8, 64), np.float32), gguf.GGMLQuantizationType.Q4_1))
    packed = PackedWeight(blocks, "Q4_1")
    model = nn.ModuleDict({"a": PackedLinear(packed, torch.zeros(8)), "b": PackedLinear(packed)})
    assert attach(model, LoRA(rank=1)).total_parameters == 8 * 64 + 8
