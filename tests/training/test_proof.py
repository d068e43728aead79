"""What stops a run: adapters that get no gradient, and numbers that are none."""

import math

import pytest
import torch
from torch import nn

from lorafit.config import LoRA
from lorafit.data.packing import split_passes
from lorafit.errors import TrainingError
from lorafit.modules import adapter_modules, attach
from lorafit.training.proof import check_finite, check_first_gradients
from tests.oracles.adapted import documents


def network(count: int) -> nn.ModuleDict:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in range(count)})
    attach(model, LoRA(rank=2))
    return model


def test_adapters_without_a_gradient_are_named() -> None:
    model = network(3)
    model["layer0"](torch.ones(1, 4)).sum().backward()
    model["layer2"].lora_B.grad = torch.zeros(4, 2)  # there, but nothing in it
    with pytest.raises(TrainingError, match=r"^2 adapters had no gradient .*: layer1, layer2; leave them out"):
        check_first_gradients(model)
    for name in ("layer1", "layer2"):
        model[name](torch.ones(1, 4)).sum().backward()
    # A gets none in the first step, because B is zero; B's is enough.
    assert not any(bool(module.adapter_parameters()["lora_A"].grad.any()) for module in adapter_modules(model).values())  # type: ignore[union-attr]
    check_first_gradients(model)


def test_many_silent_adapters_are_counted() -> None:
    with pytest.raises(TrainingError, match=r"^8 adapters .*: layer0, layer1, layer2, layer3, layer4 and 3 more; "):
        check_first_gradients(network(8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_step_and_rows(value: float) -> None:
    batches = split_passes(documents([5, 6, 7]), 11)
    check_finite(3.0, "loss", 4, batches)
    with pytest.raises(
        TrainingError, match=rf"the loss is {value} in step 4, on rows.jsonl:1, rows.jsonl:2, rows.jsonl:3;"
    ):
        check_finite(value, "loss", 4, batches)
