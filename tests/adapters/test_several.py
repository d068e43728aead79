"""Many adapters on one base: each computes what it does alone, to the last bit; rows of a batch as PEFT's do."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import lorafit
from lorafit.adapters import load_adapter
from lorafit.adapters.several import Adapters
from lorafit.config import AdapterConfig, LoRA, QALoRA
from lorafit.containers.atomic import fingerprint
from lorafit.errors import AdapterError, ConfigError, LorafitWarning
from lorafit.models.load import load_base
from lorafit.modules import LoRALinear, PackedWeight, QALoRALinear, adapter_modules, adapters_disabled
from tests.adapters.several import base, logits, saved
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

# PEFT asks transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIGS: dict[str, AdapterConfig] = {
    "wide": LoRA(rank=4),
    "thin": LoRA(rank=2, alpha=3.0, scaling="rslora", targets="q_proj,down_proj,lm_head"),
    "dropping": LoRA(rank=3, dropout=0.5, targets=r".*layers\.1\..*"),
    "qalora": QALoRA(rank=2, alpha=40.0),
    "dora": LoRA(rank=2, dora=True, targets="v_proj,o_proj"),
    "more": LoRA(rank=2, targets="k_proj", modules_to_save=("lm_head",)),
}
PLAIN = ("wide", "thin", "dropping")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, tied=False)


@pytest.fixture(scope="module")
def folder(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved adapters of every kind, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        saved(tiny, folder / name, config, seed, base=str(tiny.path), base_sha256=fingerprint(tiny.path))
    return folder


@pytest.fixture(scope="module")
def alone(tiny: TinyLlama, folder: Path) -> dict[str | None, Tensor]:
    """Logits of the base, and with each adapter loaded as the only one."""
    result: dict[str | None, Tensor] = {None: logits(base(tiny))}
    for name in CONFIGS:
        model = base(tiny)
        load_adapter(model, folder / name)
        result[name] = logits(model)
    # Each does something, and something else.
    for one in result:
        assert all(one == two or float((result[one] - result[two]).abs().max()) > 1e-2 for two in result)
    return result


def filled(tiny: TinyLlama, folder: Path, *names: str) -> Adapters:
    adapters = Adapters(base(tiny))
    for name in names:
        adapters.add(name, folder / name)
    return adapters


def generated(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of eight tokens to a batch that is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=2
    )
    return tokens[:, longest:].tolist()


# Switching.


def test_each_adapter_computes_what_it_does_alone(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, *CONFIGS)
    assert adapters.names == tuple(CONFIGS)
    assert adapters.active is None
    assert torch.equal(logits(adapters.model), alone[None])
    for name in (*CONFIGS, None, *reversed(CONFIGS), "thin", "thin"):
        adapters.use(name)
        assert adapters.active == name
        assert torch.equal(logits(adapters.model), alone[name]), name


def test_what_is_in_use_is_what_is_trained_and_saved(tiny: TinyLlama, folder: Path, tmp_path: Path) -> None:
    adapters = filled(tiny, folder, "wide", "thin")
    model: Any = adapters.model
    adapters.use("thin")
    assert set(adapter_modules(model)) == {
        *(f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")),
        "lm_head",
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) == sum(
        parameter.numel()
        for module in adapter_modules(model).values()
        for parameter in module.parameters(recurse=False)
    )
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    optimizer.step()
    after = logits(model)
    model.save_pretrained(tmp_path / "thin")
    adapters.use("wide")
    untouched = base(tiny)
    load_adapter(untouched, folder / "wide")
    assert torch.equal(logits(model), logits(untouched))
    adapters.use("thin")
    assert torch.equal(logits(model), after)
    again = base(tiny)
    record, _ = load_adapter(again, tmp_path / "thin")
    assert record.config == CONFIGS["thin"]
    assert torch.equal(logits(again), after)


def test_a_model_with_an_adapter_keeps_it_under_a_name(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    model, _ = lorafit.load(tiny.path, adapter=folder / "wide", compute="fp32")
    adapters = lorafit.Adapters(model, "first")
    assert (adapters.names, adapters.active) == (("first",), "first")
    adapters.add("qalora", folder / "qalora")
    assert torch.equal(logits(model), alone["wide"])
    adapters.use("qalora")
    assert torch.equal(logits(model), alone["qalora"])
    adapters.use("first")
    assert torch.equal(logits(model), alone["wide"])


def test_a_new_adapter_is_trained_beside_others(tiny: TinyLlama, folder: Path, alone: Any, tmp_path: Path) -> None:
    adapters = filled(tiny, folder, "wide")
    model: Any = adapters.model
    adapters.use("wide")
    coverage = adapters.add("new", LoRA(rank=2, targets="v_proj"))
    assert torch.equal(logits(model), alone["wide"])
    adapters.use("new")
    assert torch.equal(logits(model), alone[None])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) == coverage.trainable_parameters
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    optimizer.step()
    after = logits(model)
    assert not torch.equal(after, alone[None])
    model.save_pretrained(tmp_path)
    adapters.use("wide")
    assert torch.equal(logits(model), alone["wide"])
    adapters.add("again", tmp_path)
    adapters.use("again")
    assert torch.equal(logits(model), after)


def test_an_adapter_from_elsewhere_is_not_lost(tiny: TinyLlama, folder: Path) -> None:
    adapters = filled(tiny, folder, "wide")
    lorafit.attach(adapters.model, LoRA(rank=2))
    for act in (lambda: adapters.use("wide"), lambda: adapters.add("thin", folder / "thin")):
        with pytest.raises(AdapterError, match="attached or taken off elsewhere"):
            act()
    assert len(adapter_modules(adapters.model)) == 14


def test_the_mode_follows_the_model(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, "dropping", "qalora")
    adapters.model.train()
    adapters.use("dropping")
    assert not torch.equal(logits(adapters.model), logits(adapters.model))
    adapters.use(None)
    adapters.model.eval()
    adapters.use("dropping")
    assert torch.equal(logits(adapters.model), alone["dropping"])


def test_removing(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, "wide", "thin")
    adapters.use("wide")
    gone = weakref.ref(next(iter(adapter_modules(adapters.model).values())))
    adapters.remove("wide")
    assert (adapters.names, adapters.active) == (("thin",), None)
    assert torch.equal(logits(adapters.model), alone[None])
    gc.collect()
    assert gone() is None
    adapters.add("wide", folder / "thin")
    adapters.use("wide")
    assert torch.equal(logits(adapters.model), alone["thin"])


def test_there_is_one_base(tiny: TinyLlama, folder: Path) -> None:
    model = base(tiny)
    before = {
        name: packed.blocks.data_ptr() for name, packed in model.named_modules() if isinstance(packed, PackedWeight)
    }
    adapters = Adapters(model)
    for i in range(4):
        adapters.add(f"task {i}", folder / "wide")
    adapters.use("task 2")
    packed = {module for module in model.modules() if isinstance(module, PackedWeight)}
    assert {each.blocks.data_ptr() for each in packed} == set(before.values())
    assert len(packed) == len(set(before.values()))


@pytest.mark.parametrize("format", ["Q4_1", "Q4_0"])
def test_qalora_adapters_share_promoted_blocks_and_offsets(tmp_path: Path, format: Any) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format=format)
    for seed, name in enumerate("ab"):
        saved(tiny, tmp_path / name, QALoRA(rank=2), seed, base=str(tiny.path), base_sha256=fingerprint(tiny.path))
    adapters = filled(tiny, tmp_path, "a", "b")
    found = []
    for name in "ab":
        adapters.use(name)
        module = adapter_modules(adapters.model)["model.layers.0.self_attn.q_proj"]
        assert isinstance(module, QALoRALinear)
        found.append((module.trained.blocks.data_ptr(), module.offsets.data_ptr()))
        alone = base(tiny)
        load_adapter(alone, tmp_path / name)
        assert torch.equal(logits(adapters.model), logits(alone))
    assert found[0] == found[1]


# Disabling.


def test_disabling_restores_what_was_before(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, "wide", "qalora")
    model = adapters.model
    adapters.use("wide")
    one = adapter_modules(model)["model.layers.0.self_attn.q_proj"]
    one.enabled = False
    partly = logits(model)
    assert not torch.equal(partly, alone["wide"])
    with adapters.disabled():
        assert torch.equal(logits(model), alone[None])
        with adapters.disabled():
            assert torch.equal(logits(model), alone[None])
        assert torch.equal(logits(model), alone[None])
    assert torch.equal(logits(model), partly)
    one.enabled = True
    # Whatever happens inside, even a switch or an error.
    with adapters.disabled():
        assert adapters.active is None
        for name in ("qalora", "wide", None):
            adapters.use(name)
            assert torch.equal(logits(model), alone[name])
    assert torch.equal(logits(model), alone["wide"])
    with pytest.raises(IndexError), adapters.disabled():
        logits(model, torch.tensor([[320]]))
    assert adapters.active == "wide"
    assert torch.equal(logits(model), alone["wide"])
    with adapters.disabled():
        adapters.remove("wide")
    assert adapters.active is None
    with adapters.disabled():
        pass
    assert torch.equal(logits(model), alone[None])


# Rows of a batch.


def test_each_row_has_its_own_adapter(tiny: TinyLlama, folder: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, *PLAIN, "qalora")
    adapters.use("qalora")
    names = ["thin", None, "wide", "dropping", "thin"]
    tokens = torch.arange(40, 90).repeat(5, 1)
    with adapters.rows(names):
        assert adapters.active is None
        together = logits(adapters.model, tokens)
        with adapters.disabled():
            torch.testing.assert_close(logits(adapters.model, tokens)[:1], alone[None], rtol=0, atol=1e-4)
        with adapters_disabled(adapters.model):
            torch.testing.assert_close(logits(adapters.model, tokens)[:1], alone[None], rtol=0, atol=1e-4)
        with adapters.rows(["wide"]):
            torch.testing.assert_close(logits(adapters.model), alone["wide"], rtol=0, atol=1e-4)
        assert torch.equal(logits(adapters.model, tokens), together)
    for row, name in zip(together, names, strict=True):
        # float32 through two layers, products in another order: 1e-5 on logits of size 10.
        torch.testing.assert_close(row, alone[name][0], rtol=0, atol=1e-4)
    assert adapters.active == "qalora"
    assert torch.equal(logits(adapters.model), alone["qalora"])


def test_rows_equal_pefts(tiny: TinyLlama, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    ]
    peft = get_peft_model(tiny.dense(), LoraConfig(**settings[0]), adapter_name="one").eval()
    peft.add_adapter("two", LoraConfig(**settings[1]))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    peft.save_pretrained(tmp_path)
    names = ["two", "__base__", "one", "one"]
    tokens = torch.randint(3, 320, (4, 20))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    adapters = Adapters(base(tiny))
    with pytest.warns(LorafitWarning, match="holds no hash"):
        adapters.add("one", tmp_path / "one")
    with pytest.warns(LorafitWarning, match="holds no hash"):
        adapters.add("two", tmp_path / "two")
    theirs = logits(peft, tokens, attention_mask=mask, adapter_names=names)
    with adapters.rows([None if name == "__base__" else name for name in names]):
        ours = logits(adapters.model, tokens, attention_mask=mask)
    # Of padded tokens nothing is said.
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-4)


def test_a_padded_batch_generates_what_each_row_does_alone(tiny: TinyLlama, folder: Path) -> None:
    adapters = filled(tiny, folder, *PLAIN)
    names = ["wide", "thin", None, "dropping"]
    prompts = [list(range(40, 60)), [70, 71, 72], list(range(100, 111)), [9, 8, 7, 6]]
    with adapters.rows(names):
        together = generated(adapters.model, prompts)
    for name, prompt, answer in zip(names, prompts, together, strict=True):
        adapters.use(name)
        assert generated(adapters.model, [prompt]) == [answer], name
    adapters.use("wide")
    assert generated(adapters.model, prompts) != together


def test_rows_pass_gradients(tiny: TinyLlama, folder: Path) -> None:
    adapters = filled(tiny, folder, "wide", "thin")
    tokens = torch.randint(3, 320, (3, 12), generator=torch.Generator().manual_seed(0))
    target = torch.randn(3, 12, 320, generator=torch.Generator().manual_seed(1))

    def gradients(name: str) -> dict[str, Tensor]:
        adapters.use(name)
        found = {}
        for layer, module in adapter_modules(adapters.model).items():
            for part, parameter in module.adapter_parameters().items():
                assert parameter.grad is not None
                found[f"{layer}.{part}"] = parameter.grad.clone()
                parameter.grad = None
        return found

    model: Any = adapters.model
    names = ["wide", "thin", "wide"]
    with adapters.rows(names):
        (model(tokens).logits * target).sum().backward()
    together = {name: gradients(name) for name in ("wide", "thin")}
    for name in ("wide", "thin"):
        adapters.use(name)
        for row, whose in enumerate(names):
            if whose == name:
                (model(tokens[row : row + 1]).logits * target[row : row + 1]).sum().backward()
        for part, expected in gradients(name).items():
            # float32, sums in another order.
            torch.testing.assert_close(together[name][part], expected, rtol=1e-3, atol=1e-3)


def test_what_rows_refuse(tiny: TinyLlama, folder: Path, tmp_path: Path) -> None:
    adapters = filled(tiny, folder, *CONFIGS)
    for name, kind in (("qalora", "QALoRALinear"), ("dora", "DoRALinear"), ("more", "TrainedCopy")):
        with pytest.raises(AdapterError, match=f"plain LoRA only, but '{name}' has a {kind} at"), adapters.rows([name]):
            pass
    with pytest.raises(AdapterError, match="there is no adapter 'gone'; there are wide, thin"), adapters.rows(["gone"]):
        pass
    with pytest.raises(ConfigError, match="given none"), adapters.rows([]):
        pass
    with adapters.rows(["wide", None]):
        with pytest.raises(AdapterError, match=r"named for 2 rows, but a layer got .* \[3, 5, 128\]"):
            logits(adapters.model, torch.ones(3, 5, dtype=torch.long))
        with pytest.raises(AdapterError, match="rows have different adapters here"):
            adapter_modules(adapters.model)["model.layers.0.self_attn.q_proj"].delta_weight()
        with pytest.raises(AdapterError, match="rows have different adapters here"):
            adapters.model.save_pretrained(tmp_path / "rows")
    adapters.model.train()
    with pytest.raises(AdapterError, match=r"'dropping' was .* call model\.eval"), adapters.rows(["dropping"]):
        pass
    assert adapters.active is None


# What does not fit.


def test_adding_what_does_not_fit_changes_nothing(tiny: TinyLlama, folder: Path, tmp_path: Path, alone: Any) -> None:
    adapters = filled(tiny, folder, "wide")
    adapters.use("wide")
    with pytest.raises(AdapterError, match="there is an adapter 'wide' already"):
        adapters.add("wide", folder / "thin")
    digest = fingerprint(tiny.path)
    saved(tiny, tmp_path / "other", LoRA(rank=2), base=str(tiny.path), base_sha256="1" * 64)
    with pytest.raises(AdapterError, match="not trained on the base of this model: SHA-256 is"):
        adapters.add("other", tmp_path / "other")
    saved(tiny, tmp_path / "other", LoRA(rank=2), base=str(tiny.path), base_sha256=digest, quantize="nf4")
    with pytest.raises(AdapterError, match="quantisation is none and nf4"):
        adapters.add("other", tmp_path / "other")
    larger = write_tiny_llama(tmp_path / "larger.gguf", layers=3, hidden=128)
    saved(larger, tmp_path / "larger", LoRA(rank=2), base=str(tiny.path), base_sha256=digest)
    with pytest.raises(AdapterError, match="does not fit the model"):
        adapters.add("larger", tmp_path / "larger")
    source: Any = 3
    with pytest.raises(ConfigError, match=r"from a directory or from settings such as .* given as int"):
        adapters.add("number", source)
    for unknown in (adapters.use, adapters.remove):
        with pytest.raises(AdapterError, match="there is no adapter 'gone'; there are wide"):
            unknown("gone")
    with pytest.raises(AdapterError, match="there is no adapter 'gone'; none was added"):
        Adapters(base(tiny)).use("gone")
    assert (adapters.names, adapters.active) == (("wide",), "wide")
    assert torch.equal(logits(adapters.model), alone["wide"])


def test_a_base_that_was_quantised_while_it_was_loaded(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format="F16", embedding_format="F16")
    facts = {"base": str(tiny.path), "base_sha256": fingerprint(tiny.path), "quantize": "q8_0"}
    saved(tiny, tmp_path / "a", LoRA(rank=2), **facts)
    model = load_base(tiny.path, compute="fp32", quantize="q8_0").model
    adapters = Adapters(model)
    adapters.add("a", tmp_path / "a")
    adapters.use("a")
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    with pytest.raises(AdapterError, match="quantisation is none and q8_0"):
        Adapters(base(tiny)).add("a", tmp_path / "a")
