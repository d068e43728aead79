"""PEFT's ``add_weighted_adapter`` is the oracle for combining; where it means something else, the weighted sum is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorafit.adapters import load_adapter, read_record
from lorafit.adapters.combine import combine, common_base, save_combined
from lorafit.adapters.updates import Adapter, read_adapter
from lorafit.config import Combination, CombineMethod, LoRA, QALoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.modules import adapter_modules
from tests.adapters.several import base, logits, saved
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

# PEFT asks transformers for something by an old name, and says that density 1 prunes nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The density 1:UserWarning"),
]

Family = tuple[PeftModel, list[Adapter]]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Scalings of 2, 1.5 and 2.5. The first is not rsLoRA: PEFT gives its result the alpha for a scaling of 1, but keeps the
# first adapter's use_rslora, which makes the result √rank times too large.
A = {"r": 4, "lora_alpha": 8, "target_modules": ALL}
B = {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL}
C = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
WEIGHTS = (0.7, -0.4, 1.3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, tied=False)


def several(model: nn.Module, directory: Path, *settings: dict[str, Any]) -> tuple[PeftModel, list[Adapter]]:
    """Adapters with random factors in one PEFT model, named task0, task1, ..., and what lorafit reads of each."""
    torch.manual_seed(0)
    peft: Any = None
    for i, each in enumerate(settings):
        config = LoraConfig(**each)
        if peft is None:
            peft = get_peft_model(model, config, adapter_name="task0")
        else:
            peft.add_adapter(f"task{i}", config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    peft.save_pretrained(directory, save_embedding_layers=False)
    return peft, [read_adapter(directory / f"task{i}") for i in range(len(settings))]


@pytest.fixture(scope="module")
def family(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, list[Adapter]]:
    """A, B and C, and A with another alpha; tests add combinations to the PEFT model and leave these alone."""
    return several(tiny.dense(), tmp_path_factory.mktemp("family"), A, B, C, A | {"lora_alpha": 1})


def mixed(
    peft: PeftModel, tasks: Sequence[int], weights: Sequence[float], method: str, **more: Any
) -> dict[str, Tensor]:
    """The updates of PEFT's combination, which is removed again."""
    peft.add_weighted_adapter([f"task{i}" for i in tasks], list(weights), "mixed", combination_type=method, **more)
    result = deltas(peft, "mixed")
    peft.delete_adapter("mixed")
    return result


def deltas(peft: PeftModel, name: str) -> dict[str, Tensor]:
    """Layer -> the update that PEFT computes for an adapter."""
    found = {
        key: module for key, module in peft.base_model.model.named_modules() if name in getattr(module, "lora_A", {})
    }
    return {key: module.get_delta_weight(name).detach() for key, module in found.items()}


def assert_same(combined: Any, expected: dict[str, Tensor]) -> None:
    assert combined.updates.keys() == expected.keys()
    for name, update in combined.updates.items():
        # float32 on both sides: sums of tens of products of numbers of size 0.1, and singular vectors of them.
        torch.testing.assert_close(update.dense(), expected[name], rtol=0, atol=2e-6)
    assert max(float(each.abs().max()) for each in expected.values()) > 0.01


def the_sum(peft: PeftModel, weights: Sequence[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for i, weight in enumerate(weights):
        for name, delta in deltas(peft, f"task{i}").items():
            total[name] = total.get(name, 0) + weight * delta.double()
    return {name: delta.float() for name, delta in total.items()}


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_and_cat_are_the_weighted_sum_of_updates(family: Family, method: CombineMethod) -> None:
    peft, adapters = family
    combined = combine(adapters[:3], WEIGHTS, Combination(method=method))
    assert_same(combined, the_sum(peft, WEIGHTS))
    assert combined.rank == 10
    assert combined.distance < 1e-6
    assert_same(combined, mixed(peft, (0, 1, 2), WEIGHTS, "cat"))


def test_ranks_and_alphas_of_single_layers_count(tiny: TinyLlama, tmp_path: Path) -> None:
    own = B | {"rank_pattern": {"q_proj": 6, "layers.1.*up_proj": 1}, "alpha_pattern": {"down_proj": 11, "q_proj": 2}}
    some = C | {"layers_to_transform": [1], "target_modules": ["k_proj", "q_proj"]}
    peft, adapters = several(tiny.dense(), tmp_path / "in", A, own, some)
    combined = combine(adapters, WEIGHTS, Combination(method="cat"))
    assert_same(combined, the_sum(peft, WEIGHTS))
    assert combined.rank == 12
    assert_same(combined, mixed(peft, (0, 1, 2), WEIGHTS, "cat"))
    # The result has one rank, and all layers that any of them has, no more.
    (tmp_path / "out").mkdir()
    save_combined(combine(adapters[2:], [1.0], Combination()), tmp_path / "out", adapters[2].record)
    model = base(tiny)
    load_adapter(model, tmp_path / "out")
    assert set(adapter_modules(model)) == {f"model.layers.1.self_attn.{name}_proj" for name in "kq"}


@pytest.mark.parametrize(("rank", "expected_rank"), [(None, 4), (1, 1), (3, 3), (7, 7)])
def test_svd_equals_peft(family: Family, rank: int | None, expected_rank: int) -> None:
    peft, adapters = family
    combined = combine(adapters[:3], WEIGHTS, Combination(method="svd", rank=rank))
    theirs = mixed(peft, (0, 1, 2), WEIGHTS, "svd", svd_rank=rank)
    assert_same(combined, theirs)
    assert combined.rank == expected_rank
    total = the_sum(peft, WEIGHTS)
    squares = sum(float(delta.norm() ** 2) for delta in total.values())
    lost = sum(float((theirs[name] - delta).norm() ** 2) for name, delta in total.items())
    assert combined.distance == pytest.approx((lost / squares) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize(
    ("method", "majority"),
    [
        *((method, majority) for method in ("ties", "ties_svd") for majority in ("total", "frequency")),
        *((method, None) for method in ("magnitude_prune", "magnitude_prune_svd")),
    ],
)
def test_pruning_by_size_equals_peft(family: Family, method: CombineMethod, majority: Any, density: float) -> None:
    peft, adapters = family
    tasks = (0, 1, 2) if method.endswith("svd") else (0, 1, 3)  # factors need equal ranks
    recipe = Combination(method=method, density=density, majority=majority)
    combined = combine([adapters[i] for i in tasks], WEIGHTS, recipe)
    more = {"majority_sign_method": majority} if majority else {}
    assert_same(combined, mixed(peft, tasks, WEIGHTS, method, density=density, **more))
    assert combined.rank == 4


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dropping_at_random_equals_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: CombineMethod, majority: Any
) -> None:
    more = {"majority": majority} if "ties" in method else {}
    # With one layer both draw in the same order.
    model = nn.Sequential(nn.Linear(40, 30))
    peft, adapters = several(model, tmp_path, *(each | {"target_modules": ["0"]} for each in (A, B)))
    combined = combine(adapters, WEIGHTS[:2], Combination(method=method, density=0.6, seed=5, **more))
    # PEFT draws when it makes the new adapter, then calls this, then draws what it drops.
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(5))
    peft.add_weighted_adapter(
        ["task0", "task1"],
        list(WEIGHTS[:2]),
        "mixed",
        combination_type=method,
        density=0.6,
        majority_sign_method=majority,
    )
    assert_same(combined, deltas(peft, "mixed"))
    other = combine(adapters, WEIGHTS[:2], Combination(method=method, density=0.6, seed=6, **more))
    assert not torch.allclose(other.updates["0"].dense(), combined.updates["0"].dense())


def test_pefts_linear_is_the_sum_where_no_factors_meet(tiny: TinyLlama, tmp_path: Path, family: Family) -> None:
    """It multiplies the sums of the factors, so with two adapters of one layer it adds B₁A₂ and B₂A₁."""
    apart = [A | {"target_modules": ["q_proj"]}, B | {"target_modules": ["o_proj", "v_proj"]}]
    peft, adapters = several(tiny.dense(), tmp_path, *apart)
    assert_same(combine(adapters, [0.7, 0.4], Combination()), mixed(peft, (0, 1), (0.7, 0.4), "linear"))
    peft, adapters = family
    assert_same(combine([adapters[2]], [-0.6], Combination()), mixed(peft, [2], [-0.6], "linear"))
    theirs = mixed(peft, (0, 1), (0.7, -0.4), "linear")
    name, total = next(iter(the_sum(peft, (0.7, -0.4)).items()))
    assert float((theirs[name] - total).norm()) > 0.5 * float(total.norm())
    # There is a name for that here too.
    unpruned = Combination(method="magnitude_prune", density=1.0)
    assert_same(combine(adapters[:2], [0.7, -0.4], unpruned), theirs)


def test_linear_takes_no_more_ranks_than_the_sum_has(family: Family) -> None:
    peft, adapters = family
    combined = combine([adapters[0], adapters[0]], [0.25, 0.5], Combination())
    assert combined.rank == 4
    assert_same(combined, {name: 0.75 * delta for name, delta in deltas(peft, "task0").items()})
    nothing = combine([adapters[2], adapters[2]], [1.0, -1.0], Combination())
    assert nothing.rank == 1
    assert nothing.distance == 0.0
    # In float64 the two cancel to the last digits.
    assert max(float(update.dense().abs().max()) for update in nothing.updates.values()) < 1e-12


@pytest.mark.parametrize("method", get_args(CombineMethod))
def test_a_saved_combination_is_an_adapter_for_lorafit_and_peft(
    tiny: TinyLlama, tmp_path: Path, method: CombineMethod
) -> None:
    configs = [LoRA(rank=4, alpha=3.0, scaling="rslora"), LoRA(rank=4, alpha=6.0, targets="q_proj,down_proj")]
    adapters = [saved(tiny, tmp_path / str(i), config, seed=i) for i, config in enumerate(configs)]
    pruned = "ties" in method or "prune" in method or "dare" in method
    combined = combine(adapters, [0.5, 2.0], Combination(method=method, density=0.5 if pruned else None))
    (tmp_path / "both").mkdir()
    save_combined(combined, tmp_path / "both", common_base(adapters))
    record = read_record(tmp_path / "both")
    assert (record.base, record.base_sha256) == ("tiny.gguf", "0" * 64)
    ours = base(tiny)
    load_adapter(ours, tmp_path / "both")
    for name, module in adapter_modules(ours).items():
        torch.testing.assert_close(module.delta_weight(), combined.updates[name].dense(), rtol=0, atol=1e-6)
    peft = PeftModel.from_pretrained(tiny.dense(), tmp_path / "both").eval()
    # float32 through two layers, as in test_peft.py.
    torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=1e-4)
    assert float((logits(ours) - logits(base(tiny))).abs().max()) > 0.1


def test_the_file_says_what_it_was_made_from(tiny: TinyLlama, tmp_path: Path) -> None:
    from safetensors import safe_open

    from lorafit.containers.atomic import fingerprint

    adapters = [saved(tiny, tmp_path / name, LoRA(rank=2), seed=i) for i, name in enumerate("ab")]
    combined = combine(adapters, [1.0, -0.5], Combination(method="dare_ties_svd", density=0.5, seed=3))
    (tmp_path / "c").mkdir()
    save_combined(combined, tmp_path / "c", common_base(adapters))
    with safe_open(tmp_path / "c" / "adapter_model.safetensors", framework="pt") as file:
        note = json.loads(file.metadata()["lorafit"])
    assert note["method"] == "lora"
    assert note["combined"] == {
        "method": "dare_ties_svd",
        "density": 0.5,
        "seed": 3,
        "rank": 2,
        "distance": combined.distance,
        "of": [
            {
                "path": str(tmp_path / name),
                "weight": weight,
                "sha256": fingerprint(tmp_path / name / "adapter_model.safetensors"),
            }
            for name, weight in (("a", 1.0), ("b", -0.5))
        ],
    }


def test_qalora_adapters_combine_into_plain_lora(tiny: TinyLlama, tmp_path: Path) -> None:
    adapters = [saved(tiny, tmp_path / str(i), QALoRA(rank=4, alpha=40.0), seed=i) for i in range(2)]
    combined = combine(adapters, [0.5, 0.5], Combination())
    assert combined.rank == 4  # four blocks in a row of 128
    model = base(tiny)
    load_adapter(model, tmp_path / "0", hold_offsets=False)
    name, module = next(iter(adapter_modules(model).items()))
    other = base(tiny)
    load_adapter(other, tmp_path / "1", hold_offsets=False)
    expected = 0.5 * module.delta_weight() + 0.5 * adapter_modules(other)[name].delta_weight()
    # Offsets of size 0.1 are rounded to half precision in the modules, and not in the sum.
    torch.testing.assert_close(combined.updates[name].dense(), expected, rtol=0, atol=2e-4)


# What cannot be combined.


def test_adapters_of_different_bases_are_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    one = saved(tiny, tmp_path / "one", LoRA(rank=2))
    for changes in ({"base_sha256": "1" * 64}, {"base_sha256": ""}, {"quantize": "nf4"}):
        other = saved(tiny, tmp_path / "other", LoRA(rank=2), **changes)
        with pytest.raises(AdapterError, match="were not trained on the same base"):
            common_base([one, other])
    tensors = [
        saved(tiny, tmp_path / digest, LoRA(rank=2), base_sha256=digest, base_tensors_sha256="2" * 64)
        for digest in "34"
    ]
    assert common_base(tensors).base_sha256 == "3"  # files with other metadata and the same tensors
    renamed = saved(tiny, tmp_path / "other", LoRA(rank=2), base="elsewhere/tiny.gguf")
    assert common_base([one, renamed]).base == "tiny.gguf"
    unknown = [saved(tiny, tmp_path / name, LoRA(rank=2), base=name, base_sha256="") for name in "ab"]
    with pytest.raises(AdapterError, match=r"a and .*b were not trained on the same base: name is a and b"):
        common_base(unknown)


def test_what_does_not_fit_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    one = saved(tiny, tmp_path / "one", LoRA(rank=2))
    two = saved(tiny, tmp_path / "two", LoRA(rank=3))
    with pytest.raises(AdapterError, match=r"down_proj has the ranks 2, 3, .* take linear, cat, or"):
        combine([one, two], [1, 1], Combination(method="ties", density=0.5))
    for weights in ([1.0], [1.0, 1.0, 1.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match=r"weights are .* must be 2 numbers"):
            combine([one, two], weights, Combination())
    smaller = write_tiny_llama(tmp_path / "smaller.gguf", hidden=64)
    with pytest.raises(AdapterError, match=r"is \[.*\] in .*three and \[.*\] in .*one; .* different models"):
        combine([one, saved(smaller, tmp_path / "three", LoRA(rank=2))], [1, 1], Combination())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "average"}, "method is 'average'"),
        ({"method": "ties"}, "ties needs a density"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "dare_linear_svd", "density": 1.5}, "density is 1.5"),
        ({"method": "linear", "density": 0.5}, "density has no effect on the method linear"),
        ({"method": "cat", "rank": 4}, "rank has no effect on the method cat"),
        ({"method": "ties", "density": 0.5, "rank": 4}, "rank has no effect on the method ties"),
        ({"method": "svd", "rank": 0}, "rank is 0"),
        ({"method": "dare_linear", "density": 0.5, "majority": "total"}, "majority has no effect"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed has no effect"),
        ({"method": "ties", "density": 0.5, "majority": "mean"}, "majority is 'mean'"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Combination(**settings)


def test_a_broken_adapter_is_refused_at_once(tiny: TinyLlama, tmp_path: Path) -> None:
    from tests.adapters.test_peft import rewritten

    saved(tiny, tmp_path, LoRA(rank=2))
    prefix = "base_model.model.model.layers.0.self_attn"

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{prefix}.q_proj.lora_A.weight"]
        tensors[f"{prefix}.k_proj.lora_A.weight"] = torch.zeros(3, 128)
        tensors[f"{prefix}.v_proj.lora_B.weight"][0, 0] = torch.nan
        tensors["base_model.model.lm_head.weight"] = torch.zeros(1)

    rewritten(tmp_path / "adapter_model.safetensors", spoil)
    with pytest.raises(AdapterError) as error:
        read_adapter(tmp_path)
    assert "lm_head" not in str(error.value)
    for part in (
        "q_proj has only one of two factors",
        "k_proj has 3 rows of A for 2 columns of B",
        "v_proj.lora_B.weight holds numbers that are not finite",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoRA(rank=2, dora=True), r"down_proj\.lora_magnitude_vector and 13 more"),
        (LoRA(rank=2, targets="q_proj", modules_to_save=("lm_head",)), r"lm_head\.weight"),
        (LoRA(rank=2, trainable_token_indices={"embed_tokens": (5, 7)}), r"token_adapter\.trainable_tokens_delta"),
    ],
)
def test_more_than_updates_is_not_combined(tiny: TinyLlama, tmp_path: Path, config: LoRA, named: str) -> None:
    adapter = saved(tiny, tmp_path, config)
    with pytest.raises(AdapterError, match=rf"is more than low-rank updates \(it holds .*{named}\)"):
        combine([adapter], [1.0], Combination())
