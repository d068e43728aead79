"""Experts that are quantised while they are loaded, or were before: from a tensor for each matrix to stacks."""

import json
import re
from pathlib import Path

import bitsandbytes.functional as F
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.config import LoRA, QLoRA
from lorafit.errors import ModelError
from lorafit.formats import dequantize, quantize
from lorafit.models.load import load_base
from lorafit.models.quantizing import BLOCK_FORMATS
from lorafit.modules import PackedExperts, attach
from tests.oracles.family_gguf import random_model, write_family
from tests.oracles.tiny_directory import write_tiny_directory

EXPERTS, HIDDEN, INNER = 3, 128, 64
FIELDS = {
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "norm_topk_prob": True,
}  # fmt: skip
IDS = torch.randint(3, 260, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


def stacks(model: PreTrainedModel) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def matrices(stack: PackedExperts, name: str) -> dict[str, Tensor]:
    """The matrices of a stack in float32, by their names in a checkpoint."""
    owner, role = name.rsplit(".", 1)
    roles = ("gate_proj", "up_proj") if role == "gate_up_proj" else (role,)
    return {
        f"{owner}.{expert}.{part}.weight": weight.clone()
        for expert in range(EXPERTS)
        for part, weight in zip(roles, stack.dense(expert, torch.float32).chunk(len(roles)), strict=True)
    }


@pytest.mark.parametrize("how", ["nf4", "q8_0"])
def test_each_matrix_is_quantised_as_if_it_were_alone(tmp_path: Path, how: str) -> None:
    dense = write_tiny_directory(tmp_path / "model", "qwen3_moe", **FIELDS)
    base = load_base(tmp_path / "model", compute="fp32", quantize=how)  # type: ignore[arg-type]
    weights, name = load_file(tmp_path / "model" / "model.safetensors"), BLOCK_FORMATS[how]  # type: ignore[index]
    found = stacks(base.model)
    assert len(found) == 4
    for place, stack in found.items():
        assert stack.format_name == name
        for key, matrix in matrices(stack, place).items():
            blocks, constants = quantize(weights[key], name)
            assert torch.equal(matrix, dequantize(blocks, name, tuple(matrix.shape), constants)), key
    assert base.kept == {}
    # The same, where transformers has the rounded weights.
    with torch.no_grad():
        for place, parameter in dense.named_parameters():
            if place in found:
                parameter.copy_(torch.stack([found[place].dense(e, torch.float32).clone() for e in range(EXPERTS)]))
            elif place.endswith("proj.weight"):
                packed = base.model.get_submodule(place.removesuffix(".weight")).packed
                parameter.copy_(packed.dense(torch.float32))  # type: ignore[operator, union-attr]
    # float32 products in another order, two layers deep, on logits that reach 10.
    torch.testing.assert_close(logits(base.model), logits(dense), rtol=0, atol=1e-4)
    assert set(found) < set(attach(base.model, QLoRA(rank=2)).wrapped)


def test_what_no_block_fits_is_left_as_it_is_and_named_once(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "model", "qwen3_moe", **FIELDS | {"moe_intermediate_size": 96})
    base = load_base(tmp_path / "model", compute="bf16", quantize="nf4")
    assert base.kept == {
        f"model.layers.{i}.mlp.experts.down_proj": "its rows of 96 weights are not whole blocks of 64" for i in range(2)
    }
    weights = load_file(tmp_path / "model" / "model.safetensors")
    down = stacks(base.model)["model.layers.1.mlp.experts.down_proj"]
    expected = weights["model.layers.1.mlp.experts.2.down_proj.weight"].bfloat16()
    assert torch.equal(down.dense(2, torch.bfloat16), expected)
    formats = attach(base.model, LoRA(rank=2)).formats
    assert formats["model.layers.1.mlp.experts.down_proj"] == "BF16"
    assert formats["model.layers.1.mlp.experts.gate_up_proj"] == "NF4_DQ"


def test_a_missing_matrix_is_named(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "model", "qwen3_moe", **FIELDS)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight is missing"):
        load_base(tmp_path / "model", quantize="nf4")


def test_a_gguf_file_in_full_precision(tmp_path: Path) -> None:
    path = write_family(tmp_path / "moe.gguf", "qwen3moe", random_model("qwen3moe"), format="BF16")
    before, base = load_base(path, compute="fp32"), load_base(path, compute="fp32", quantize="q8_0")
    for place, stack in stacks(base.model).items():
        assert stack.format_name == "Q8_0"
        for expert in range(stack.experts):
            original = stacks(before.model)[place].dense(expert, torch.float32).clone()
            blocks, _ = quantize(original, "Q8_0")
            expected = dequantize(blocks, "Q8_0", tuple(original.shape))
            assert torch.equal(stack.dense(expert, torch.float32), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_experts_that_bitsandbytes_quantised(tmp_path: Path, nested: bool) -> None:
    """As checkpoints were saved by transformers when its experts were linear layers."""
    write_tiny_directory(tmp_path, "qwen3_moe", **FIELDS)
    tensors, expected = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        tensors[name] = weight
        if re.search(r"experts\.\d+\.\w+_proj\.weight", name):
            codes, state = F.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
            tensors |= {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
            expected[name] = F.dequantize_4bit(codes, state)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_base(tmp_path, compute="fp32").model
    found = {key: value for place, stack in stacks(model).items() for key, value in matrices(stack, place).items()}
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        assert torch.equal(matrix, expected[name]), name
