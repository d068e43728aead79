"""A GGUF-LoRA in llama.cpp against the model that was trained: the proof of names, row orders and scaling."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lorafit
from lorafit.commands.export import export
from lorafit.config import AdapterConfig, LoRA, QALoRA
from lorafit.errors import AdapterError, ConfigError, MergeError, MissingFileError
from lorafit.exporting.beside import BesideLoss
from lorafit.exporting.gguf_lora import pieces_of, write_gguf_lora
from lorafit.merging.engine import Answers
from lorafit.models.keymap import family_of_model
from lorafit.models.load import load, load_base
from lorafit.modules import adapter_modules, attach
from tests.merging.runs import write_run
from tests.oracles.family_gguf import KINDS, random_model, write_family
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import write_tiny_llama

TOKENS = [7, 3, 92, 41, 200, 13, 150, 88, 5, 61, 30, 7]
# Sums of float32 in another order: logits of size 10 differ by some 1e-5. Gemma's llama.cpp looks GELU up in a table
# of half-precision numbers.
FLOAT_ERROR, GELU_ERROR = 5e-5, 1e-3


def adapted(base: Path, config: AdapterConfig, size: float = 0.15) -> PreTrainedModel:
    """A model with a random adapter, of which each row of each B does something else."""
    model = load_base(base, compute="fp32").model
    attach(model, config)
    generator = torch.Generator().manual_seed(3)
    for module in adapter_modules(model).values():
        for parameter in module.adapter_parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return model


def write(model: PreTrainedModel, path: Path, dtype: str = "F32") -> Path:
    family = family_of_model(model.config.model_type, "test")
    write_gguf_lora(path, pieces_of(model, family), family.architecture, dtype, {"general.name": "test"})
    return path


@torch.no_grad()
def logits(model: PreTrainedModel) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("family", KINDS)
def test_llamacpp_computes_what_was_trained(family: str, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base.gguf", family, random_model(family))
    model = adapted(base, LoRA(rank=4, alpha=6.0))
    engine = LlamaCppOracle(base, lora=write(model, tmp_path / "lora.gguf"))
    alone = LlamaCppOracle(base).logits(TOKENS)
    assert apart(logits(model), alone) > 1.0
    assert apart(logits(model), engine.logits(TOKENS)) < (GELU_ERROR if "gemma" in family else FLOAT_ERROR)
    assert np.array_equal(engine.logits(TOKENS, lora_scale=0.0), alone)


@pytest.mark.parametrize(("scaling", "alpha"), [("rslora", 3.0), ("plain", 0.7)])
def test_every_scaling(scaling: str, alpha: float, tmp_path: Path) -> None:
    """llama.cpp divides alpha by the rank, whatever the adapter was trained with."""
    base = write_family(tmp_path / "base.gguf", "llama", random_model("llama"))
    model = adapted(base, LoRA(rank=6, alpha=alpha, scaling=scaling))
    engine = LlamaCppOracle(base, lora=write(model, tmp_path / "lora.gguf"))
    assert apart(logits(model), engine.logits(TOKENS)) < FLOAT_ERROR


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_ranks_and_alphas_that_differ_by_module(scaling: str, tmp_path: Path) -> None:
    """One alpha serves the whole file, so what is missing has to go into B."""
    base = write_family(tmp_path / "base.gguf", "llama", random_model("llama"))
    patterns = {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"q_proj": 9.0, "v_proj": 1.0},
    }
    model = adapted(base, LoRA(rank=4, alpha=6.0, scaling=scaling, **patterns))
    ranks = {module.lora_factors()[0].shape[0] for module in adapter_modules(model).values()}
    assert ranks == {2, 4, 7}
    engine = LlamaCppOracle(base, lora=write(model, tmp_path / "lora.gguf"))
    assert apart(logits(model), LlamaCppOracle(base).logits(TOKENS)) > 1.0
    assert apart(logits(model), engine.logits(TOKENS)) < FLOAT_ERROR


def test_half_precision_is_half_the_size_and_near(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base.gguf", "qwen2", random_model("qwen2"))
    model = adapted(base, LoRA(rank=4, alpha=6.0))
    full, half = write(model, tmp_path / "full.gguf"), write(model, tmp_path / "half.gguf", "F16")
    assert half.stat().st_size < 0.6 * full.stat().st_size
    # 2⁻¹¹ for each number of the adapter, and for the inputs that llama.cpp rounds with them; logits are of size 10.
    assert 1e-4 < apart(logits(model), LlamaCppOracle(base, lora=half).logits(TOKENS)) < 2e-2


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base.gguf", "qwen2", random_model("qwen2"))
    model = adapted(base, LoRA(rank=4, alpha=6.0), size=1e5)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj cannot be written: .* too large for F16"):
        write(model, tmp_path / "half.gguf", "F16")


def test_what_gguf_py_reads(tmp_path: Path) -> None:
    """The file as another reader sees it."""
    base = write_family(tmp_path / "base.gguf", "llama", random_model("llama"))
    model = adapted(base, LoRA(rank=4, alpha=6.0, targets="q_proj,down_proj"))
    reader = gguf.GGUFReader(write(model, tmp_path / "lora.gguf"))
    values = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
        "general.name": "test",
    }
    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    expected = {}
    for layer in range(2):
        expected |= {f"blk.{layer}.attn_q.weight.lora_a": [4, 64], f"blk.{layer}.attn_q.weight.lora_b": [64, 4]}
        expected |= {f"blk.{layer}.ffn_down.weight.lora_a": [4, 96], f"blk.{layer}.ffn_down.weight.lora_b": [64, 4]}
    assert shapes == expected


def test_the_certificate_of_a_lora_run(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", format="Q4_1").path
    run = write_run(tmp_path / "run", base, LoRA(rank=2, alpha=4.0, scaling="rslora"))
    certificate = export(str(run), str(tmp_path / "lora.gguf"), format="gguf-lora")
    assert {path.name for path in tmp_path.iterdir()} == {
        "base.gguf", "run", "lora.gguf", "lora.gguf.certificate.json"
    }  # fmt: skip
    assert certificate.as_dict() == _from_json(tmp_path / "lora.gguf.certificate.json")
    assert (certificate.ranks, certificate.folded, certificate.differs_by) == ({2: 14}, 0, [])
    assert certificate.largest_difference < 1e-6
    assert isinstance(certificate.held_out, BesideLoss)
    # The same factors in the same arithmetic; only the factor in front is rounded to float32.
    assert certificate.held_out.run_loss == pytest.approx(certificate.held_out.file_loss, abs=2e-4)
    answers = certificate.llamacpp.answers
    assert isinstance(answers, Answers)
    tuned = LlamaCppOracle(base, lora=tmp_path / "lora.gguf").logits(TOKENS)
    assert apart(tuned, LlamaCppOracle(base).logits(TOKENS)) > 0.5
    assert abs(answers.merged_loss - answers.base_loss) > 0.05


def _from_json(path: Path) -> dict[str, object]:
    read = json.loads(path.read_text())
    read["ranks"] = {int(rank): count for rank, count in read["ranks"].items()}
    return read


def test_qalora_differs_from_the_merged_model_by_rounding_alone(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", format="Q4_1").path
    run = write_run(tmp_path / "run", base, QALoRA(rank=2, alpha=4.0), size=0.1)
    certificate = export(str(run), str(tmp_path / "lora.gguf"), format="gguf-lora")
    assert len(certificate.differs_by) == 1 and "offsets of 14 tensors to half precision" in certificate.differs_by[0]
    assert isinstance(certificate.held_out, BesideLoss)
    assert 0 < abs(certificate.held_out.run_loss - certificate.held_out.file_loss) < 1e-3


def test_an_adapter_of_a_directory_serves_a_file_of_the_same_model(tmp_path: Path) -> None:
    original = random_model("qwen3moe")
    base = write_family(tmp_path / "base.gguf", "qwen3moe", original)
    original.save_pretrained(tmp_path / "base")
    load(base)[1].save_pretrained(tmp_path / "base")
    run = write_run(tmp_path / "run", tmp_path / "base", LoRA(rank=2, alpha=4.0), held_out=False)
    certificate = export(str(run / "adapter"), str(tmp_path / "lora.gguf"), format="gguf-lora")
    assert "base is no GGUF file" in certificate.llamacpp.not_measured
    assert certificate.held_out.not_measured.startswith("the run held no rows out")
    tuned = logits(load(run, compute="fp32")[0])
    assert apart(tuned, LlamaCppOracle(base).logits(TOKENS)) > 0.3
    assert apart(tuned, LlamaCppOracle(base, lora=tmp_path / "lora.gguf").logits(TOKENS)) < FLOAT_ERROR


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices", "use_dora", "lora_bias"])
def test_what_is_more_than_lora_is_refused_by_name(field: str, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf").path
    run = write_run(tmp_path / "run", base, LoRA(rank=2, alpha=4.0))
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: ["lm_head"]}))
    with pytest.raises(AdapterError, match=f"{field} is set, and a GGUF-LoRA holds low-rank updates"):
        export(str(run), str(tmp_path / "lora.gguf"), format="gguf-lora")
    assert not (tmp_path / "lora.gguf").exists()


def test_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", tied=True).path
    run = write_run(tmp_path / "run", base, LoRA(rank=2, alpha=4.0, targets="lm_head"))
    with pytest.raises(AdapterError, match="lm_head shares its matrix with the embedding"):
        export(str(run), str(tmp_path / "lora.gguf"), format="gguf-lora")


def test_an_untied_head_is_adapted(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base.gguf", "llama", random_model("llama"))
    model = adapted(base, LoRA(rank=4, alpha=6.0, targets="lm_head"))
    engine = LlamaCppOracle(base, lora=write(model, tmp_path / "lora.gguf"))
    assert apart(logits(model), LlamaCppOracle(base).logits(TOKENS)) > 0.5
    assert apart(logits(model), engine.logits(TOKENS)) < FLOAT_ERROR


@pytest.mark.parametrize("options", [{"dora": True}, {"modules_to_save": ("lm_head",)}, {"targets": "embed_tokens"}])
def test_what_was_trained_otherwise_is_refused_by_name(options: dict[str, object], tmp_path: Path) -> None:
    model, _ = load(write_family(tmp_path / "base.gguf", "llama", random_model("llama")))
    lorafit.attach(model, LoRA(rank=2, alpha=4.0, **options))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"use_dora|modules_to_save|embed_tokens has an adapter of the kind LoRAEmb"):
        export(str(tmp_path / "adapter"), str(tmp_path / "lora.gguf"), format="gguf-lora")


def test_a_loss_above_the_tolerance_is_refused(tmp_path: Path) -> None:
    """QA-LoRA of a size at which the rounding of m' shows."""
    base = write_tiny_llama(tmp_path / "base.gguf", format="Q4_1").path
    run = write_run(tmp_path / "run", base, QALoRA(rank=2, alpha=4.0), size=0.1)
    measured = export(str(run), str(tmp_path / "kept.gguf"), format="gguf-lora").held_out
    apart_by = measured.file_loss - measured.run_loss
    assert apart_by > 0, "these seeds show nothing"
    with pytest.raises(MergeError, match=r"lora\.gguf is not kept: beside its base it has a held-out loss of"):
        export(str(run), str(tmp_path / "lora.gguf"), format="gguf-lora", certificate_tolerance=apart_by / 2)
    assert not (tmp_path / "lora.gguf").exists()
    silent = write_run(tmp_path / "silent", base, LoRA(rank=2, alpha=4.0), held_out=False)
    with pytest.raises(ConfigError, match="no held-out rows"):
        export(str(silent), str(tmp_path / "lora.gguf"), format="gguf-lora", certificate_tolerance=0.1)


@pytest.mark.filterwarnings("ignore::lorafit.errors.LorafitWarning")
def test_an_adapter_whose_base_is_somewhere_else(tmp_path: Path) -> None:
    """As PEFT writes it: it names a model of a hub, which is here as a GGUF file."""
    base = write_family(tmp_path / "base.gguf", "llama", random_model("llama"))
    peft = get_peft_model(
        random_model("llama"), LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear")
    )
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(len(name)))
    peft.peft_config["default"].base_model_name_or_path = "somebody/model"
    peft.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "lora.gguf"
    with pytest.raises(MissingFileError, match="somebody/model, which is not here; say where it is"):
        export(str(tmp_path / "adapter"), str(output), format="gguf-lora")
    export(str(base), str(output), format="gguf-lora", adapter=str(tmp_path / "adapter"))
    assert apart(logits(peft), LlamaCppOracle(base).logits(TOKENS)) > 1.0
    assert apart(logits(peft), LlamaCppOracle(base, lora=output).logits(TOKENS)) < FLOAT_ERROR
    with pytest.raises(ConfigError, match="--adapter has no effect on --format gguf"):
        export(str(base), str(tmp_path / "all.gguf"), format="gguf", adapter=str(tmp_path / "adapter"))
