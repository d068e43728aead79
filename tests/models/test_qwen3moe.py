"""A mixture of experts as a whole model: from the file, through training, to the files that PEFT and llama.cpp read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import lorafit
from lorafit.adapters import AdapterRecord, load_adapter, save_adapter
from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA, TrainConfig
from lorafit.errors import AdapterError, ConfigError, ContainerError, ModelError
from lorafit.merging import apply, certify, plan, verify
from lorafit.models.load import load_base
from lorafit.modules import Experts, LoRAExperts, adapter_modules, attach
from lorafit.training.proof import check_first_gradients
from tests.merging.runs import write_run
from tests.oracles.adapted import fill
from tests.oracles.family_gguf import random_model, write_family
from tests.training.rows import write_rows

# PEFT asks transformers for something by an old name, and looks for the base's vocabulary.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

TOKENS = torch.randint(3, 260, (1, 48), generator=torch.Generator().manual_seed(0))
LAYERS, EXPERTS, HIDDEN, INNER = 2, 5, 64, 32  # of the tiny model
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return random_model("qwen3moe")


@pytest.fixture(scope="module")
def files(dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format of the matrices -> the model's file."""
    folder = tmp_path_factory.mktemp("moe")
    return {
        name: write_family(folder / f"{name}.gguf", "qwen3moe", dense, format=name) for name in ("F32", "Q8_0", "Q4_1")
    }


def base(path: Path) -> PreTrainedModel:
    return load_base(path, compute="fp32").model


def dequantized(path: Path, dense: PreTrainedModel) -> PreTrainedModel:
    """transformers' model of the weights that are in a file, as gguf-py reads them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, LAYERS)
    found = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    model = type(dense)(dense.config).eval()
    for name, parameter in model.named_parameters():
        roles = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else (name.rsplit(".", 1)[-1],)
        plain = [name.replace("gate_up_proj", role).removesuffix(".weight") for role in roles]
        arrays = [found[f"{names.get_name(part)}.weight"] for part in plain]
        values = torch.from_numpy(np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0].copy())
        parameter.data = values.view(parameter.shape)
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits[0]


@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_1"])
def test_a_file_is_the_model_in_transformers(files: dict[str, Path], dense: PreTrainedModel, format: str) -> None:
    """In llama.cpp it is so too: see ``test_families.py``."""
    model = base(files[format])
    # float32, products in another order.
    torch.testing.assert_close(logits(model), logits(dequantized(files[format], dense)), rtol=0, atol=1e-4)
    # Token by token, as in generation, through kernels that do not unpack.
    torch.testing.assert_close(token_by_token(model), logits(model), rtol=0, atol=1e-4)


@torch.no_grad()
def token_by_token(model: PreTrainedModel) -> Tensor:
    rows, cache = [], None
    for i in range(TOKENS.shape[1]):
        output = model(input_ids=TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, 0])
    return torch.stack(rows)


def test_coverage_names_experts_and_routers(files: dict[str, Path]) -> None:
    model = base(files["Q4_1"])
    total = sum(parameter.numel() for parameter in random_model("qwen3moe").parameters())
    coverage = attach(model, LoRA(rank=3))
    assert coverage.total_parameters == total
    for i in range(LAYERS):
        experts = f"model.layers.{i}.mlp.experts"
        assert coverage.wrapped[f"{experts}.gate_up_proj"] == EXPERTS * 3 * (HIDDEN + 2 * INNER)
        assert coverage.wrapped[f"{experts}.down_proj"] == EXPERTS * 3 * (INNER + HIDDEN)
        assert coverage.formats[f"{experts}.gate_up_proj"] == coverage.formats[f"{experts}.down_proj"] == "Q4_1"
        assert coverage.frozen[f"model.layers.{i}.mlp.gate"] == "router (not a linear layer)"
        assert coverage.formats[f"model.layers.{i}.mlp.gate"] == "float32"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == coverage.trainable_parameters
    assert coverage.frozen.keys() | coverage.wrapped.keys() == coverage.formats.keys()


def test_gate_and_up_of_different_formats(dense: PreTrainedModel, tmp_path: Path) -> None:
    gate = dense.model.layers[1].mlp.experts.gate_up_proj[:, :INNER].detach().numpy()
    gates = "blk.1.ffn_gate_exps.weight"
    path = write_family(
        tmp_path / "mixed.gguf", "qwen3moe", dense, format=lambda name: "F32" if name == gates else "Q8_0"
    )
    model = base(path)
    torch.testing.assert_close(logits(model), logits(dequantized(path, dense)), rtol=0, atol=1e-4)
    found = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(found.dense(2, torch.float32)[:INNER], torch.from_numpy(gate[2]))
    assert attach(model, LoRA(rank=1)).formats["model.layers.1.mlp.experts.gate_up_proj"] == "F32+Q8_0"


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (QALoRA(rank=2), "experts (QA-LoRA trains linear layers)"),
        (LoRA(rank=2, dropout=0.1), "experts (dropout, which PEFT's adapters of experts lack)"),
    ],
)
def test_what_cannot_train_experts_leaves_them_and_says_so(
    files: dict[str, Path], method: AdapterConfig, reason: str
) -> None:
    coverage = attach(base(files["Q4_1"]), method)
    for i in range(LAYERS):
        for role in ("gate_up_proj", "down_proj"):
            assert coverage.frozen[f"model.layers.{i}.mlp.experts.{role}"] == reason
    assert {name.rsplit(".", 1)[-1] for name in coverage.wrapped} == set(LINEAR)
    advice = "use --method lora" if isinstance(method, QALoRA) else "leave out --dropout"
    with pytest.raises(AdapterError, match=f"no target layer can take .*{re.escape(reason)}.*{advice}"):
        attach(base(files["Q4_1"]), replace(method, targets="experts.down_proj"))


def test_plain_lora_on_the_experts_beside_qalora(files: dict[str, Path], tmp_path: Path) -> None:
    model = base(files["Q4_1"])
    coverage = attach(model, QALoRA(rank=2, frozen_tensors="lora"))
    experts = {f"model.layers.{i}.mlp.experts.{role}" for i in range(LAYERS) for role in ("gate_up_proj", "down_proj")}
    assert set(coverage.beside) == experts
    assert all(isinstance(adapter_modules(model)[name], LoRAExperts) for name in experts)
    with pytest.raises(ConfigError, match="no effect"):
        attach(base(files["Q4_1"]), QALoRA(rank=2, targets="q_proj", frozen_tensors="lora"))


def test_experts_merge_by_rounding(files: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", files["Q4_1"], QALoRA(rank=2, frozen_tensors="lora"), size=0.1, held_out=False)
    planned = plan(run, requantize="f32")
    assert len(planned.changes) == LAYERS * (len(LINEAR) + 3)  # gate and up are two tensors of the file
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    model, _ = lorafit.load(run, compute="fp32")
    # The sum of two matrices in one product against the sum of two products, in float32.
    torch.testing.assert_close(logits(base(tmp_path / "tuned.gguf")), logits(model), rtol=0, atol=1e-4)
    assert float((logits(model) - logits(base(files["Q4_1"]))).abs().max()) > 0.1
    certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
    assert certificate.requantized is not None
    assert certificate.requantized.formats == {"Q4_1 to F32": 3 * LAYERS}
    assert certificate.requantized.relative_error < 1e-6


CONFIGS = [
    LoRA(rank=3),
    LoRA(rank=3, alpha=5.0, scaling="rslora", targets="experts.gate_up_proj,down_proj"),
    LoRA(rank=2, alpha=1.5, scaling="plain", targets="down_proj"),
    LoRA(rank=2, targets="q_proj,gate_up_proj"),
    LoRA(rank=2, targets=r".*layers\.1\..*proj"),  # short names would say too much
    LoRA(rank=2, targets="model.layers.0.mlp.experts.gate_up_proj"),
    QLoRA(rank=3),
]


def saved(path: Path, directory: Path, config: AdapterConfig) -> PreTrainedModel:
    """A model with a random adapter, which is also in the directory."""
    torch.manual_seed(0)
    model = base(path)
    attach(model, config)
    fill(model, std=0.1)
    save_adapter(model, directory, AdapterRecord(config, "moe.gguf", "0" * 64))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_peft_computes_the_logits_of_a_saved_adapter(
    files: dict[str, Path], dense: PreTrainedModel, tmp_path: Path, config: LoRA
) -> None:
    model = saved(files["Q4_1"], tmp_path, config)
    theirs = dequantized(files["Q4_1"], dense)
    before = logits(theirs)
    peft = PeftModel.from_pretrained(theirs, tmp_path).eval()
    # float32 through two layers, on logits of size 5, which the adapter moves by more than 0.1.
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-4)
    assert float((logits(model) - before).abs().max()) > 0.1
    # PEFT has the same numbers of parameters, so that it adapted the same layers.
    trained = sum(parameter.numel() for name, parameter in peft.named_parameters() if "lora_" in name)
    assert trained == sum(p.numel() for module in adapter_modules(model).values() for p in module.parameters())
    # And what PEFT saves again is what it was given.
    peft.save_pretrained(tmp_path / "again")
    ours, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_was_saved_is_what_is_loaded(files: dict[str, Path], tmp_path: Path, config: LoRA) -> None:
    model, other = saved(files["Q4_1"], tmp_path, config), base(files["Q4_1"])
    _, coverage = load_adapter(other, tmp_path)
    assert set(coverage.wrapped) == set(adapter_modules(model))
    for one, two in zip(adapter_modules(model).values(), adapter_modules(other).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], [], r".*layers\.0.*(q|k)_proj"])
def test_adapters_that_peft_wrote(
    files: dict[str, Path], dense: PreTrainedModel, tmp_path: Path, modules: str | list[str]
) -> None:
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=modules, target_parameters=["mlp.experts.down_proj", "experts.gate_up_proj"]
    )
    torch.manual_seed(0)
    peft = get_peft_model(dequantized(files["Q4_1"], dense), config).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path)
    model = base(files["Q4_1"])
    before = logits(model)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-4)
    assert float((logits(model) - before).abs().max()) > 0.1


def test_files_that_do_not_fit_are_refused(files: dict[str, Path], dense: PreTrainedModel, tmp_path: Path) -> None:
    for tensors, message in (
        ({"blk.1.ffn_up_exps.weight": None}, r"model\.layers\.1\.mlp\.experts\.up_proj\.weight is missing"),
        ({"blk.1.ffn_gate_inp.weight": None}, r"model\.layers\.1\.mlp\.gate\.weight is missing"),
        (
            {"blk.0.ffn_down_exps.weight": np.zeros((EXPERTS, INNER, HIDDEN))},
            r"blk\.0\.ffn_down_exps\.weight has the shape \[5, 32, 64\], not \[5, 64, 32\]",
        ),
        ({"blk.0.ffn_up_shexp.weight": np.zeros((INNER, HIDDEN))}, r"'blk\.0\.ffn_up_shexp\.weight' is not a tensor"),
        # A layer without experts, which transformers knows and llama.cpp does not.
        (
            {f"blk.0.ffn_{role}{end}.weight": np.zeros((HIDDEN, INNER)) if not end else None
             for role in ("gate", "up", "down") for end in ("", "_exps")},
            r"model\.layers\.0\.mlp\.experts\.gate_proj\.weight is missing",
        ),
    ):  # fmt: skip
        path = write_family(tmp_path / "broken.gguf", "qwen3moe", dense, tensors=tensors)
        with pytest.raises(ModelError, match=message):
            load_base(path)
    broken = dense.model.layers[0].mlp.experts.gate_up_proj.detach().numpy()[:, INNER:].copy()
    broken[EXPERTS - 1, -1, -1] = np.inf
    path = write_family(tmp_path / "broken.gguf", "qwen3moe", dense, tensors={"blk.0.ffn_up_exps.weight": broken})
    with pytest.raises(ContainerError, match=r"'blk\.0\.ffn_up_exps\.weight' holds numbers that are not finite"):
        load_base(path)


def test_a_directory_has_experts_too(files: dict[str, Path], dense: PreTrainedModel, tmp_path: Path) -> None:
    folder = directory(files["F32"], dense, tmp_path / "dense")
    model = base(folder)
    loaded = type(dense).from_pretrained(folder, attn_implementation="sdpa")
    # Norms are summed in another order.
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=1e-5)
    coverage = attach(model, LoRA(rank=2))
    assert coverage.formats["model.layers.0.mlp.experts.gate_up_proj"] == "float32"
    assert set(coverage.wrapped) == set(attach(base(files["F32"]), LoRA(rank=2)).wrapped)
    assert coverage.total_parameters == sum(parameter.numel() for parameter in dense.parameters())
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    # float32, products in another order.
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    fill(model, std=0.1)
    save_adapter(model, tmp_path / "adapter", AdapterRecord(LoRA(rank=2), str(folder), ""))
    peft = PeftModel.from_pretrained(type(dense).from_pretrained(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_a_directory_with_layers_without_experts_is_refused(
    files: dict[str, Path], tmp_path: Path, setting: dict[str, Any]
) -> None:
    folder = directory(files["F32"], random_model("qwen3moe", **setting), tmp_path / "dense")
    with pytest.raises(ModelError, match=f"{next(iter(setting))}"):
        load_base(folder)


def test_a_directory_whose_router_chooses_more_experts_than_there_are(files: dict[str, Path], tmp_path: Path) -> None:
    folder = directory(files["F32"], random_model("qwen3moe", num_experts_per_tok=EXPERTS + 1), tmp_path / "dense")
    with pytest.raises(
        ModelError, match=f"dense: each token is to go to {EXPERTS + 1} experts, but there are {EXPERTS}"
    ):
        load_base(folder)


def directory(path: Path, dense: PreTrainedModel, folder: Path) -> Path:
    dense.save_pretrained(folder)
    load_base(path).tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora", "qalora"])
def test_training_lowers_the_loss(files: dict[str, Path], tmp_path: Path, method: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 60)
    config = TrainConfig(
        str(files["Q4_1"]), data, output=str(tmp_path / "run"), method=method, rank=2, steps=12, batch_size=8,
        samples=0, learning_rate=1e-2,
    )  # fmt: skip
    summary = lorafit.train(config)
    # Measured: from 6.0 to 2.8, and 3.9 where the experts are frozen.
    assert summary.eval_loss_after < 0.8 * summary.eval_loss_before
    recorded = json.loads((tmp_path / "run/summary.json").read_text())["coverage"]
    state = recorded["wrapped"] if method != "qalora" else recorded["frozen"]
    assert {f"model.layers.0.mlp.experts.{role}" for role in ("gate_up_proj", "down_proj")} < state.keys()
    model, _ = lorafit.load(tmp_path / "run", compute="fp32")
    trained = [module for module in adapter_modules(model).values() if isinstance(module, LoRAExperts)]
    assert len(trained) == (0 if method == "qalora" else 2 * LAYERS)
    assert all(module.lora_B.any() for module in trained)


def test_layers_that_are_computed_again_learn_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    data, losses = write_rows(tmp_path / "rows.jsonl", 60), []
    for memory in ("high", "lowest"):
        config = TrainConfig(
            str(files["Q4_1"]), data, output=str(tmp_path / memory), method="lora", rank=2, steps=4, batch_size=8,
            samples=0, learning_rate=1e-2, compute="fp32", memory=memory,
        )  # fmt: skip
        lorafit.train(config)
        lines = map(json.loads, (tmp_path / memory / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) >= 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_expert_without_a_token_in_the_first_step_is_no_error(files: dict[str, Path]) -> None:
    model = base(files["Q4_1"])
    attach(model, LoRA(rank=2))
    model(input_ids=TOKENS[:, :1]).logits.square().sum().backward()
    check_first_gradients(model)
    idle = 0
    for module in adapter_modules(model).values():
        if isinstance(module, LoRAExperts):
            assert module.lora_B.grad is not None
            idle += int((~module.lora_B.grad.flatten(1).any(1)).sum())
    assert idle == 2 * LAYERS * (EXPERTS - 2)  # one token goes to two experts of each layer


def test_qalora_merges_beside_frozen_experts(files: dict[str, Path], dense: PreTrainedModel, tmp_path: Path) -> None:
    shutil.copy(files["Q4_1"], tmp_path / "base.gguf")
    config = TrainConfig(
        str(tmp_path / "base.gguf"), write_rows(tmp_path / "rows.jsonl", 60), output=str(tmp_path / "run"),
        method="qalora", rank=2, steps=4, batch_size=4, samples=0, compute="fp32",
    )  # fmt: skip
    lorafit.train(config)
    lorafit.merge(str(tmp_path / "run"), str(tmp_path / "tuned.gguf"))
    model, _ = lorafit.load(tmp_path / "run", compute="fp32")
    assert torch.equal(logits(base(tmp_path / "tuned.gguf")), logits(model))
