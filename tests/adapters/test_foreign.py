"""PEFT is the oracle of which names its configuration means."""

import re
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lorafit.adapters.foreign import read_targets

NAMES = [
    f"{start}.{block}.{end}"
    for start in ("model.layers", "model.decoder.layers", "encoder.h", "h", "layers")
    for block in (0, 1, 2, 10, 11, 21)
    for end in (
        *("self_attn.q_proj", "self_attn.v_proj", "mlp.q_proj", "mlp.my_q_proj", "mlp.q-proj"),
        *("mlp.experts.1.q_proj", "mlp.experts.2.down.proj", "q_proj"),
    )
] + ["lm_head", "q_proj", "model.q_proj", "model.layers.q_proj", "1.q_proj", "a.1.q_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head", "q-proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "down.proj"]},
        {"target_modules": r".*\.1\d?\..*q_proj"},
        {"target_modules": r"model\.layers\.\d+\.mlp.*|lm_head", "exclude_modules": r".*experts.*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj", "1.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"encoder.*|h\.1.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "down.proj"], "layers_to_transform": [1, 10]},
        {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 21], "layers_pattern": ["h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "experts"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "exclude_modules": ["experts.1.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ],
    ids=str,
)
def test_the_same_modules_are_meant(fields: dict[str, Any]) -> None:
    config = LoraConfig(**fields)
    theirs = [name for name in NAMES if check_target_module_exists(config, name) and not excluded(config, name)]
    targets = read_targets(fields)
    if re.fullmatch(r"[\w.,]+", targets):
        ours = [name for name in NAMES if any(f".{name}".endswith(f".{end}") for end in targets.split(","))]
    else:
        ours = [name for name in NAMES if re.fullmatch(targets, name)]
    assert ours == theirs
    assert 0 < len(ours) < len(NAMES)


def excluded(config: LoraConfig, name: str) -> bool:
    return type(check_target_module_exists(config, name)).__name__ == "_ExcludedModule"
