"""PEFT is the oracle: what lorafit saves computes the same in PEFT, and the other way round; the rest is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.adapters import AdapterRecord, load_adapter, read_record, save_adapter
from lorafit.adapters.peft import CONFIG_FILE, OFFSETS_FILE, WEIGHTS_FILE
from lorafit.config import AdapterConfig, LoRA, QALoRA
from lorafit.data.packing import split_passes
from lorafit.errors import AdapterError, MissingFileError
from lorafit.evaluation.loss import evaluate
from lorafit.models.load import load_base
from lorafit.modules import QALoRALinear, adapter_modules, attach
from tests.oracles.adapted import documents, fill
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

# PEFT asks transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.tensor([list(range(40, 90))])
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIGS: list[AdapterConfig] = [
    LoRA(rank=4),
    LoRA(rank=4, alpha=3.0, scaling="rslora", dropout=0.1),
    LoRA(rank=4, alpha=1.5, scaling="plain"),
    LoRA(rank=3, targets="q_proj,mlp.down_proj"),
    LoRA(rank=4, targets=r".*layers\.1\..*"),  # names alone would say too much
    LoRA(rank=4, targets="model.layers.0.self_attn.k_proj"),
    LoRA(rank=4, targets="lm_head"),
    QALoRA(rank=4),
    QALoRA(rank=2, alpha=40.0, targets="v_proj,up_proj"),
    QALoRA(rank=2, targets="o_proj,lm_head", frozen_tensors="lora"),  # the head is Q8_0 and gets plain LoRA
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, tied=False)


def base(tiny: TinyLlama) -> PreTrainedModel:
    return load_base(tiny.path, compute="fp32").model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def saved(tiny: TinyLlama, directory: Path, config: AdapterConfig) -> PreTrainedModel:
    """A model with a random adapter, which is also in the directory."""
    torch.manual_seed(0)
    model = base(tiny)
    attach(model, config)
    fill(model)
    save_adapter(model, directory, AdapterRecord(config, "tiny.gguf", "0" * 64))
    return model


def edited(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Tensors changed, the header kept."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


# What lorafit saves.


@pytest.mark.parametrize("config", [c for c in CONFIGS if isinstance(c, LoRA)], ids=str)
def test_peft_computes_the_logits_of_a_saved_lora(tiny: TinyLlama, tmp_path: Path, config: LoRA) -> None:
    model = saved(tiny, tmp_path, config)
    before = logits(base(tiny))
    peft = PeftModel.from_pretrained(tiny.dense(), tmp_path).eval()
    # float32 through two layers: measured 1e-5 on logits of size 10, which the adapter moves by 1 and more.
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-4)
    assert float((logits(model) - before).abs().max()) > 0.1
    # PEFT adapted just the layers that lorafit did.
    theirs = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in peft.named_parameters()
              if "lora_A" in name}  # fmt: skip
    assert theirs == set(adapter_modules(model))


@pytest.mark.parametrize("config", [c for c in CONFIGS if isinstance(c, QALoRA)], ids=str)
def test_peft_computes_nearly_the_loss_of_a_saved_qalora(tiny: TinyLlama, tmp_path: Path, config: QALoRA) -> None:
    model = saved(tiny, tmp_path, config)
    peft = PeftModel.from_pretrained(tiny.dense(), tmp_path).eval()
    document = documents([200], share=1.0)
    tokens = torch.tensor([document[0].tokens])
    with torch.no_grad():
        theirs = float(peft(tokens, labels=tokens).loss)
        before = float(tiny.dense()(tokens, labels=tokens).loss)
    ours = evaluate(model, split_passes(document, 1000)).loss
    # Only the rounding of m' to half precision is between them: measured 1e-4, where the adapter moves the loss by 0.1.
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert abs(ours - before) > 0.02


def test_peft_computes_the_logits_of_a_saved_lora_on_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    model = load_base(smollm2_path, compute="fp32").model
    config = LoRA(rank=4, alpha=8.0, targets="q_proj,k_proj,down_proj")
    attach(model, config)
    fill(model, std=0.01)
    save_adapter(model, tmp_path, AdapterRecord(config, "smollm2-135m", ""))
    dense = type(model)(model.config)
    weights = {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n}
    for name, module in model.named_modules():
        if hasattr(module, "packed"):
            weights[name.removesuffix(".base") + ".weight"] = module.packed.dense(torch.float32).clone()
    missing, unexpected = dense.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    peft = PeftModel.from_pretrained(dense.eval(), tmp_path).eval()
    # float32 through 30 layers: measured 5e-5 on logits of size 20.
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_was_saved_is_what_is_loaded(tiny: TinyLlama, tmp_path: Path, config: AdapterConfig) -> None:
    model = saved(tiny, tmp_path, config)
    files = {CONFIG_FILE, WEIGHTS_FILE} | ({OFFSETS_FILE} if isinstance(config, QALoRA) else set())
    assert {file.name for file in tmp_path.iterdir()} == files
    record = AdapterRecord(config, "tiny.gguf", "0" * 64)
    assert read_record(tmp_path) == record
    other = base(tiny)
    found, coverage = load_adapter(other, tmp_path)
    assert found == record
    assert set(coverage.wrapped) == set(adapter_modules(model))
    for (name, one), two in zip(adapter_modules(model).items(), adapter_modules(other).values(), strict=True):
        for part, parameter in one.adapter_parameters().items():
            assert torch.equal(parameter, two.adapter_parameters()[part]), (name, part)
    assert torch.equal(logits(other), logits(model))


def test_stored_offsets_are_what_a_loaded_run_computes_with(tiny: TinyLlama, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path, QALoRA(rank=4))
    name = "model.layers.0.self_attn.q_proj"
    stored = load_file(tmp_path / OFFSETS_FILE)
    assert stored.keys() == adapter_modules(model).keys()
    assert {t.dtype for t in stored.values()} == {torch.float16}
    # As another processor might have rounded: one number goes to its neighbour.
    rewritten(tmp_path / OFFSETS_FILE, lambda t: t[name].view(torch.int16)[3, 1].add_(1))
    changed = load_file(tmp_path / OFFSETS_FILE)[name]
    assert not torch.equal(changed, stored[name])
    for hold in (True, False):
        other = base(tiny)
        load_adapter(other, tmp_path, hold_offsets=hold)
        module = adapter_modules(other)[name]
        assert isinstance(module, QALoRALinear)
        assert torch.equal(module.merged_offsets(), changed if hold else stored[name])


def test_saving_over_an_adapter_replaces_it(tiny: TinyLlama, tmp_path: Path) -> None:
    saved(tiny, tmp_path, LoRA(rank=2))
    model = saved(tiny, tmp_path, LoRA(rank=4, targets="o_proj"))
    other = base(tiny)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


# What PEFT saves.


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
        {"r": 3, "lora_alpha": 2.5, "target_modules": r".*layers\.1\..*_proj", "lora_dropout": 0.5},
        {"r": 2, "target_modules": ["model.layers.0.mlp.up_proj", "lm_head"], "init_lora_weights": "gaussian"},
    ],
)
def test_adapters_that_peft_wrote(tiny: TinyLlama, tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = get_peft_model(tiny.dense(), LoraConfig(**settings)).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    # By default PEFT adds a copy of the base's head to an adapter of the head.
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    model = base(tiny)
    record, coverage = load_adapter(model, tmp_path)
    assert isinstance(record.config, LoRA)
    assert record.config.scaling == ("rslora" if settings.get("use_rslora") else "standard")
    assert coverage.trainable_parameters == sum(p.numel() for n, p in peft.named_parameters() if "lora_" in n)
    # float32 through two layers, as above.
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-4)
    assert float((logits(model) - logits(base(tiny))).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_qalora": True, "qalora_group_size": 32}, "use_qalora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_variants_that_compute_something_else_are_refused_by_name(
    tiny: TinyLlama, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    if named == "use_qalora":  # PEFT itself makes such layers only on GPTQ bases; the configuration says enough
        get_peft_model(tiny.dense(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
    else:
        get_peft_model(tiny.dense(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {named} = .* is not supported"):
        load_adapter(base(tiny), tmp_path)


def test_other_kinds_and_fields_yet_unknown_are_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    saved(tiny, tmp_path, LoRA(rank=2))
    others: tuple[dict[str, Any], ...] = (
        {"peft_type": "LOHA"},
        {"task_type": "SEQ_CLS"},
        {"use_lora_of_2030": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"init_lora_weights": "loftq"},
    )
    for fields in others:
        directory = Path(shutil.copytree(tmp_path, tmp_path / next(iter(fields))))
        edited(directory, **fields)
        with pytest.raises(AdapterError, match=f"{next(iter(fields))} = .* is not supported"):
            read_record(directory)


# What does not fit.


def test_all_that_does_not_fit_is_said_at_once(tiny: TinyLlama, tmp_path: Path) -> None:
    saved(tiny, tmp_path, LoRA(rank=4))

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}.lora_A.weight"]
        tensors["base_model.model.other.lora_A.weight"] = torch.zeros(4, 4)
        tensors[f"{PREFIX}.lora_B.weight"] = tensors[f"{PREFIX}.lora_B.weight"][:, :3].contiguous()
        tensors[f"{PREFIX.replace('q_proj', 'v_proj')}.lora_B.weight"][0, 0] = torch.inf

    rewritten(tmp_path / WEIGHTS_FILE, spoil)
    with pytest.raises(AdapterError, match="does not fit the model") as error:
        load_adapter(base(tiny), tmp_path)
    for part in (
        "q_proj.lora_A.weight is missing",
        "base_model.model.other.lora_A.weight is unexpected",
        "q_proj.lora_B.weight has the shape [128, 3], not [128, 4]",
        "v_proj.lora_B.weight holds numbers that are not finite",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_of_a_larger_model_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    saved(tiny, tmp_path, LoRA(rank=4))
    smaller = write_tiny_llama(tmp_path / "smaller.gguf", hidden=64, layers=1)
    with pytest.raises(AdapterError, match=r"does not fit the model: .*layers\.1.* is unexpected.* and \d+ more$"):
        load_adapter(load_base(smaller.path, compute="fp32").model, tmp_path)


def test_a_qalora_factor_that_varies_within_a_block_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    saved(tiny, tmp_path, QALoRA(rank=4))
    rewritten(tmp_path / WEIGHTS_FILE, lambda t: t[f"{PREFIX}.lora_A.weight"][2, 33].mul_(1.001))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight is not constant within blocks"):
        load_adapter(base(tiny), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("model.layers.0.self_attn.q_proj"),
            r"offsets of model\.layers\.0\.self_attn\.q_proj are missing",
        ),
        (lambda t: t.update(other=torch.zeros(1)), "offsets of other are unexpected"),
        (
            lambda t: t.update({k: v[1:].clone() for k, v in t.items() if k.endswith("0.self_attn.q_proj")}),
            r"float16 \[127, 4\], not torch\.float16 \[128, 4\]",
        ),
        (lambda t: t.update({k: v.float() for k, v in t.items()}), r"are torch\.float32 .* and 9 more"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(
    tiny: TinyLlama, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    saved(tiny, tmp_path, QALoRA(rank=4))
    rewritten(tmp_path / OFFSETS_FILE, change)
    with pytest.raises(AdapterError, match=said):
        load_adapter(base(tiny), tmp_path)


def test_a_configuration_that_contradicts_the_weights_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    for config, fields in (
        (LoRA(rank=4, alpha=8.0), {"lora_alpha": 16}),
        (LoRA(rank=4, scaling="plain"), {"r": 8}),
        (QALoRA(rank=4), {"use_rslora": True}),
    ):
        directory = tmp_path / next(iter(fields))
        saved(tiny, directory, config)
        edited(directory, **fields)
        with pytest.raises(AdapterError, match=f"{next(iter(fields))} is .*, but the weights were trained with"):
            read_record(directory)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, OFFSETS_FILE])
def test_missing_and_broken_files_are_named(tiny: TinyLlama, tmp_path: Path, name: str) -> None:
    saved(tiny, tmp_path, QALoRA(rank=2))
    whole = (tmp_path / name).read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"\xff" * 100, b"[1, 2]", b"{}"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
            load_adapter(base(tiny), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingFileError, match=name.replace(".", r"\.")):
        load_adapter(base(tiny), tmp_path)


@pytest.mark.parametrize(
    "note",
    [
        "no JSON",
        "[]",
        '{"method": "lora"}',
        '{"method": "loha", "config": {}, "base": "", "base_sha256": ""}',
        '{"method": "lora", "config": {"rank": 0}, "base": "", "base_sha256": ""}',
        '{"method": "lora", "config": {"rank": "4"}, "base": "", "base_sha256": ""}',
        '{"method": "lora", "config": {"size": 4}, "base": "", "base_sha256": ""}',
    ],
)
def test_a_header_that_makes_no_sense_is_a_typed_error(tiny: TinyLlama, tmp_path: Path, note: str) -> None:
    saved(tiny, tmp_path, LoRA(rank=2))
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE, {"lorafit": note})
    with pytest.raises(AdapterError, match=tmp_path.name):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"r": "4"}, {"r": 0}, {"lora_alpha": None}, {"lora_dropout": 2}, {"target_modules": 3}]
)
def test_a_foreign_configuration_that_makes_no_sense_is_a_typed_error(
    tiny: TinyLlama, tmp_path: Path, fields: dict[str, Any]
) -> None:
    get_peft_model(tiny.dense(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    edited(tmp_path, **fields)
    with pytest.raises(AdapterError, match=tmp_path.name):
        read_record(tmp_path)
