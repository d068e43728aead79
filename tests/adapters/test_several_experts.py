"""Adapters of mixtures of experts: their updates read from files, combined, and switched."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lorafit.adapters import AdapterRecord, load_adapter, save_adapter
from lorafit.adapters.combine import combine, save_combined
from lorafit.adapters.several import Adapters
from lorafit.adapters.updates import Adapter, read_adapter
from lorafit.config import Combination, CombineMethod, LoRA
from lorafit.errors import AdapterError
from lorafit.models.load import load_base
from lorafit.modules import adapter_modules, attach
from tests.adapters.several import logits
from tests.oracles.adapted import fill
from tests.oracles.family_gguf import random_model, write_family

TOKENS = torch.tensor([list(range(3, 40))])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(
        tmp_path_factory.mktemp("moe") / "moe.gguf", "qwen3moe", random_model("qwen3moe"), format="Q4_1"
    )


def base(path: Path) -> PreTrainedModel:
    return load_base(path, compute="fp32").model


def saved(path: Path, directory: Path, config: LoRA, seed: int) -> tuple[PreTrainedModel, Adapter]:
    torch.manual_seed(seed)
    model = base(path)
    attach(model, config)
    fill(model, seed, std=0.1)
    save_adapter(model, directory, AdapterRecord(config, "moe.gguf", ""))
    return model, read_adapter(directory)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "magnitude_prune_svd"])
def test_each_expert_is_combined_with_its_like(path: Path, tmp_path: Path, method: CombineMethod) -> None:
    targets = "q_proj,experts.gate_up_proj,experts.down_proj"
    configs = LoRA(rank=2, alpha=3.0, targets=targets), LoRA(rank=3, alpha=1.0, scaling="rslora", targets=targets)
    models, adapters = zip(
        *(saved(path, tmp_path / str(seed), config, seed) for seed, config in enumerate(configs)), strict=True
    )
    # At density 1 nothing is pruned, and rank 5 holds all.
    more = {"density": 1.0, "rank": 5} if method.startswith("magnitude") else {"rank": 5} if method == "svd" else {}
    combined = combine(adapters, (0.5, -2.0), Combination(method=method, **more))
    (tmp_path / "both").mkdir()
    save_combined(combined, tmp_path / "both", adapters[0].record)
    model = base(path)
    load_adapter(model, tmp_path / "both")
    parts = [adapter_modules(each) for each in models]
    for name, module in adapter_modules(model).items():
        one, two = (part[name].delta_weight() for part in parts)
        # float32, numbers of size 0.1.
        torch.testing.assert_close(module.delta_weight(), 0.5 * one - 2.0 * two, rtol=0, atol=1e-6)
    assert combined.rank == 5


def test_experts_are_switched_and_not_given_to_rows(path: Path, tmp_path: Path) -> None:
    configs = {"experts": LoRA(rank=2), "router": LoRA(rank=2, targets="q_proj")}
    adapters = Adapters(base(path))
    before = logits(adapters.model, TOKENS)
    expected = {}
    for seed, (name, config) in enumerate(configs.items()):
        model, _ = saved(path, tmp_path / name, config, seed)
        expected[name] = logits(model, TOKENS)
        adapters.add(name, tmp_path / name)
    for name in ("router", "experts", "router"):
        adapters.use(name)
        assert torch.equal(logits(adapters.model, TOKENS), expected[name])
        assert not torch.equal(logits(adapters.model, TOKENS), before)
    with adapters.disabled():
        assert torch.equal(logits(adapters.model, TOKENS), before)
    with pytest.raises(AdapterError, match="'experts' has a LoRAExperts at"), adapters.rows(["experts"]):
        pass
