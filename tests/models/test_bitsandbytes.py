"""Checkpoints that bitsandbytes quantised, read without it, to the bits that it unpacks itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafit.commands.export import export
from lorafit.commands.merge import merge
from lorafit.config import LoRA
from lorafit.errors import LorafitWarning, ModelError
from lorafit.models.load import load_base
from lorafit.modules import PackedLinear
from tests.merging.runs import write_run
from tests.oracles.tiny_directory import write_tiny_directory

IDS = torch.randint(3, 260, (1, 40), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model"
    write_tiny_directory(path)
    return path


def saved_by_transformers(dense: Path, path: Path, **settings: Any) -> nn.Module:
    """Let transformers and bitsandbytes quantise a checkpoint and save it; returns what they would compute with."""
    shutil.copytree(dense, path)
    (path / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    model.save_pretrained(path)
    return model.eval()


def unpacked_by_bitsandbytes(codes: Tensor, state: F.QuantState) -> Tensor:
    """By its portable code: its kernel for CPUs begins a block in each row, where it had quantised across rows."""
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


def quantized_here(dense: Path, path: Path, *, block: int, nested: bool, kind: str) -> dict[str, Tensor]:
    """Write a checkpoint in bitsandbytes' layout; returns what bitsandbytes unpacks its matrices to, by name."""
    shutil.copytree(dense, path)
    tensors, expected = {}, {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        codes, state = F.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        tensors |= {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
        expected[name] = unpacked_by_bitsandbytes(codes, state)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))
    return expected


def unpacked(layer: nn.Module) -> Tensor:
    return layer.packed.dense(torch.float32) if isinstance(layer, PackedLinear) else layer.weight  # type: ignore[return-value]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_transformers_saves(dense: Path, tmp_path: Path, kind: str, nested: bool) -> None:
    theirs = saved_by_transformers(
        dense, tmp_path / "model", load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = load_base(tmp_path / "model", compute="fp32")
    layers = {name: layer for name, layer in base.model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 14
    assert {layer.packed.format_name for layer in layers.values()} == {kind.upper() + ("_DQ" if nested else "")}
    unpacked_by_them = AutoModelForCausalLM.from_pretrained(dense).eval()
    with torch.no_grad():
        for name, layer in layers.items():
            weight = theirs.get_submodule(name).weight
            expected = F.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr, arg-type]
            assert torch.equal(unpacked(layer), expected), name
            unpacked_by_them.get_submodule(name).weight.copy_(expected)
        # Not against the quantised model: on a processor that has bf16, bitsandbytes multiplies in that. The same
        # float32 products in another order, two layers deep, on logits that reach 10.
        ours, other = (model(input_ids=IDS, use_cache=False).logits for model in (base.model, unpacked_by_them))
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)
    assert (base.quantize, base.kept, base.second_quantization) == (None, {}, None)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_codes_may_be_stored_in_numbers_of_any_size(dense: Path, tmp_path: Path, storage: torch.dtype) -> None:
    theirs = saved_by_transformers(
        dense, tmp_path / "model", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage
    )
    weight = theirs.get_submodule(LAYER).weight
    assert load_file(tmp_path / "model" / "model.safetensors")[f"{LAYER}.weight"].dtype == storage
    result = unpacked(load_base(tmp_path / "model", compute="fp32").model.get_submodule(LAYER))
    assert torch.equal(result, F.dequantize_4bit(weight.data, weight.quant_state).float())  # type: ignore[union-attr, arg-type]


def test_layers_that_were_skipped_are_dense(dense: Path, tmp_path: Path) -> None:
    settings = {"load_in_4bit": True, "llm_int8_skip_modules": ["down_proj", "lm_head"]}
    saved_by_transformers(dense, tmp_path / "model", **settings)
    model = load_base(tmp_path / "model", compute="fp32").model
    assert torch.equal(model.get_submodule(LAYER).weight, load_file(dense / "model.safetensors")[f"{LAYER}.weight"])  # type: ignore[arg-type]
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), PackedLinear)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 4096])
def test_blocks_of_other_sizes(dense: Path, tmp_path: Path, block: int, nested: bool) -> None:
    """Larger ones are several of 64 with one scale, even where they begin in the middle of a row of 192."""
    expected = quantized_here(dense, tmp_path / "model", block=block, nested=nested, kind="nf4")
    base = load_base(tmp_path / "model", compute="fp32")
    form = {(64, True): "NF4_DQ", (32, False): None, (32, True): None}.get((block, nested), "NF4")
    for name, weight in expected.items():
        layer = base.model.get_submodule(name.removesuffix(".weight"))
        assert (layer.packed.format_name if isinstance(layer, PackedLinear) else None) == form
        assert torch.equal(unpacked(layer), weight), name
    assert len(base.kept) == (len(expected) if form is None else 0)


@pytest.mark.parametrize("width", [96, 90])
def test_rows_that_are_not_whole_blocks_are_unpacked(tmp_path: Path, width: int) -> None:
    write_tiny_directory(tmp_path / "dense", intermediate_size=width)
    expected = quantized_here(tmp_path / "dense", tmp_path / "model", block=64, nested=True, kind="fp4")
    base = load_base(tmp_path / "model", compute="fp32")
    for name, weight in expected.items():
        assert torch.equal(unpacked(base.model.get_submodule(name.removesuffix(".weight"))), weight), name
    assert base.kept.keys() == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_eight_bits_are_unpacked(dense: Path, tmp_path: Path) -> None:
    theirs = saved_by_transformers(dense, tmp_path / "model", load_in_8bit=True)
    base = load_base(tmp_path / "model", compute="fp32")
    assert len(base.kept) == 14
    for name in base.kept:
        weight = theirs.get_submodule(name).weight
        expected = F.int8_vectorwise_dequant(weight.data, weight.SCB)  # type: ignore[union-attr, arg-type]
        assert torch.equal(unpacked(base.model.get_submodule(name)), expected), name


def test_what_is_unpacked_while_it_is_loaded_was_quantised_nevertheless(dense: Path, tmp_path: Path) -> None:
    """So a GGUF file of it is a second quantisation, and what it was quantised from is an original for ``--onto``."""
    saved_by_transformers(dense, tmp_path / "model", load_in_8bit=True)
    base = load_base(tmp_path / "model")
    assert not any(isinstance(part, PackedLinear) for part in base.model.modules())
    assert base.origin == "model (bitsandbytes)"
    certificate = export(str(tmp_path / "model"), str(tmp_path / "out.gguf"), format="gguf", dtype="q8_0")
    assert certificate.as_dict()["second_quantization"] == "model (bitsandbytes)"
    run = write_run(tmp_path / "run", tmp_path / "model", LoRA(rank=2))
    with pytest.warns(LorafitWarning, match="was trained beside model and merged onto model, whose weights differ"):
        merge(str(run), str(tmp_path / "merged"), onto=str(dense))


def test_bitsandbytes_is_not_needed(dense: Path, tmp_path: Path) -> None:
    quantized_here(dense, tmp_path / "model", block=64, nested=True, kind="nf4")
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from lorafit.models.load import load\n"
        f"model, tokenizer = load({str(tmp_path / 'model')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("PackedLinear\n", 0), done.stderr


def test_quantising_it_again_is_refused(dense: Path, tmp_path: Path) -> None:
    quantized_here(dense, tmp_path / "model", block=64, nested=True, kind="nf4")
    with pytest.raises(ModelError, match="is quantised already, and rounding it again would lose more"):
        load_base(tmp_path / "model", quantize="q4_1")


STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def state_with(**changes: Any) -> Any:
    def edit(value: Tensor) -> Tensor:
        state = json.loads(bytes(value.tolist())) | changes
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (f"{LAYER}.weight.absmax", None, "absmax is missing"),
        (f"{LAYER}.weight.nested_absmax", lambda value: value[:1].repeat(5), "is not in a layout of bitsandbytes"),
        (f"{LAYER}.weight.nested_absmax", lambda value: value * torch.nan, "has scales that are not finite"),
        (STATE, state_with(nested_offset=float("inf")), "has scales that are not finite"),
        (f"{LAYER}.weight.quant_map", lambda value: value * 0.5, "quant_map is not bitsandbytes' own table"),
        (f"{LAYER}.weight.nested_quant_map", lambda value: value.flip(0), "nested_quant_map is not bitsandbytes' own"),
        (f"{LAYER}.weight", lambda value: value[:-1], "is not in a layout of bitsandbytes"),
        (STATE, state_with(quant_type="nf5"), "is not in a layout of bitsandbytes"),
        (STATE, state_with(blocksize=0), "is not in a layout of bitsandbytes"),
        (STATE, state_with(shape=[64, 384]), "is not in a layout of bitsandbytes"),
        (STATE, state_with(nested_blocksize=128), "is not in a layout of bitsandbytes"),
        (STATE, state_with(nested_offset="0.05"), "is not in a layout of bitsandbytes"),
        (STATE, lambda value: value[:-1], "is not in a layout of bitsandbytes"),
        (f"{LAYER}.bias", lambda value: torch.ones(128), "is not a weight of this architecture"),
    ],
)
def test_broken_checkpoints(dense: Path, tmp_path: Path, name: str, edit: Any, message: str) -> None:
    path = tmp_path / "model"
    quantized_here(dense, path, block=64, nested=True, kind="nf4")
    tensors = load_file(path / "model.safetensors")
    before = tensors.pop(name, torch.ones(1))
    if edit is not None:
        tensors[name] = edit(before)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message) as caught:
        load_base(path)
    assert str(path) in str(caught.value)
    assert LAYER in str(caught.value)
