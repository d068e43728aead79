"""Exported directories: the numbers that the blocks stand for, in a form that transformers loads, or nothing at all."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.commands.export import export
from lorafit.containers import safetensors as container
from lorafit.containers.atomic import replacing_directory
from lorafit.errors import MergeError, ModelError
from lorafit.exporting.safetensors import export_safetensors
from lorafit.models import saving
from lorafit.models.load import load, load_base
from tests.oracles.family_gguf import KINDS, random_model, write_family
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

IDS = torch.randint(3, 260, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tied=False)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_in_fp32_every_weight_is_what_the_blocks_stand_for(tiny: TinyLlama, tmp_path: Path) -> None:
    """Rows of q and k, which the file has in another order, among them."""
    certificate = export(str(tiny.path), str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tiny.weights.keys()
    for name, weight in tiny.weights.items():
        assert np.array_equal(found[name].numpy().view(np.int32), weight.view(np.int32)), name
    assert certificate.bit_identical
    assert certificate.largest_difference == 0.0
    assert certificate.tensors == len(found)
    assert certificate.parameters == sum(weight.size for weight in tiny.weights.values())
    assert certificate.source_sha256 == hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert certificate.files == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert json.loads((tmp_path / "out.certificate.json").read_text()) == certificate.as_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_written_twice(tmp_path: Path, tied: bool) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf", layers=1, tied=tied)
    export(str(tmp_path / "tiny.gguf"), str(tmp_path / "out"))
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp16", 11)])
def test_smaller_types_round_once_and_say_by_how_much(tiny: TinyLlama, tmp_path: Path, dtype: str, bits: int) -> None:
    certificate = export(str(tiny.path), str(tmp_path / "out"), dtype=dtype)  # type: ignore[arg-type]
    found = load_file(tmp_path / "out" / "model.safetensors")
    largest = 0.0
    for name, weight in tiny.weights.items():
        exact = torch.from_numpy(weight)
        assert torch.equal(found[name], exact.to(found[name].dtype)), name
        gap = (found[name].double() - exact.double()).abs()
        assert (gap <= exact.double().abs() * 2.0**-bits + 2.0**-25).all(), "half a unit in the last place"
        largest = max(largest, float(gap.max()))
    assert not certificate.bit_identical
    assert certificate.largest_difference == pytest.approx(largest, rel=1e-6)  # that was taken in float32
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype.itemsize == 2


@pytest.mark.parametrize("family", KINDS)
def test_transformers_loads_every_family(tmp_path: Path, family: str) -> None:
    original = random_model(family)
    path = write_family(tmp_path / "tiny.gguf", family, original, format="Q8_0" if family != "qwen2" else "F32")
    export(str(path), str(tmp_path / "out"))
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert type(loaded) is type(original) or family == "mistral"  # whose file without a window says llama
    # The same float32 products in another order, a few layers deep, on logits that reach 18.
    torch.testing.assert_close(logits(loaded), logits(load_base(path, compute="fp32").model), rtol=0, atol=2e-4)
    for name, weight in original.named_parameters():
        found = loaded.get_parameter(name)
        if weight.dim() == 1 or family == "qwen2":
            # A norm that is stored as a factor 1 + weight has lost what lies below 2⁻²⁴.
            torch.testing.assert_close(found, weight, rtol=0, atol=2e-7 if KINDS[family].norms_plus_one else 0)


def test_the_tokenizer_and_its_template_come_along(tiny: TinyLlama, tmp_path: Path) -> None:
    export(str(tiny.path), str(tmp_path / "out"))
    ours, theirs = load(tiny.path)[1], AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "The miller's 3 sons?"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    assert theirs.encode("<|im_start|>Ångström, 3 sons\n") == ours.encode("<|im_start|>Ångström, 3 sons\n")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (2, 1)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_origin_is_written_into_it(tiny: TinyLlama, tmp_path: Path) -> None:
    export(str(tiny.path), str(tmp_path / "out"))
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["lorafit_origin"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lorafit_origin"]) == origin
        assert file.metadata()["format"] == "pt"
    assert origin["file"] == "tiny.gguf"
    assert origin["sha256"] == hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    assert origin["formats"]["blk.1.attn_q.weight"] == "Q4_1"
    assert origin["formats"]["token_embd.weight"] == "Q8_0"
    assert origin["formats"]["output_norm.weight"] == "F32"
    assert len(origin["formats"]) == len(tiny.weights)


def test_several_files_load_as_one(tiny: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.models.saving.SHARD_BYTES", 100_000)
    certificate = export(str(tiny.path), str(tmp_path / "out"))
    count = len(certificate.files)
    assert count > 3
    files = {f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
    assert certificate.files.keys() == files
    extra = {"model.safetensors.index.json", "config.json", "generation_config.json"}
    assert names(tmp_path / "out") == files | extra | {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert all(path.stat().st_size < 100_000 + 5_000 for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(weight.size for weight in tiny.weights.values())
    assert index["weight_map"].keys() == tiny.weights.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(tiny.dense()), rtol=0, atol=5e-5)
    torch.testing.assert_close(logits(load(tmp_path / "out", compute="fp32")[0]), logits(loaded), rtol=0, atol=5e-5)


def test_what_bitsandbytes_quantised_is_exported_too(tmp_path: Path) -> None:
    from tests.models.test_bitsandbytes import quantized_here
    from tests.oracles.tiny_directory import write_tiny_directory

    write_tiny_directory(tmp_path / "dense")
    expected = quantized_here(tmp_path / "dense", tmp_path / "model", block=64, nested=True, kind="nf4")
    export(str(tmp_path / "model"), str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert set(config["lorafit_origin"]["formats"].values()) == {"NF4_DQ"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_fp16_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = random_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = 70_000.0
    path = write_family(tmp_path / "tiny.gguf", "llama", model)
    with pytest.raises(MergeError, match=r"up_proj\.weight has weights that are too large for float16; .*--dtype fp32"):
        export(str(path), str(tmp_path / "out"), dtype="fp16")
    assert names(tmp_path) == {"tiny.gguf"}
    assert export(str(path), str(tmp_path / "out"), dtype="bf16").largest_difference == 70_144 - 70_000


def test_a_wrong_byte_on_the_disk_is_seen(tiny: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = container.write_safetensors

    def spoiling(directory: Path, *arguments: object, **options: object) -> list[Path]:
        files = written(directory, *arguments, **options)  # type: ignore[arg-type]
        content = bytearray(files[0].read_bytes())
        content[-1] ^= 1
        files[0].write_bytes(content)
        return files

    monkeypatch.setattr(saving, "write_safetensors", spoiling)
    with pytest.raises(MergeError, match="is not what should have been written; check the disk"):
        export(str(tiny.path), str(tmp_path / "out"))
    assert names(tmp_path) == set()


def test_a_file_that_changes_meanwhile_is_seen(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf")
    base = load_base(tiny.path, compute="fp32")
    tiny.path.write_bytes(tiny.path.read_bytes() + b"\0")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"tiny\.gguf changed after it was loaded"):
        export_safetensors(base, tmp_path / "out", torch.float32, name="out")


def test_a_directory_that_was_there_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def interrupted() -> None:
        with replacing_directory(target) as temporary:
            (temporary / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == {"out"}
    assert names(target) == {"old"}
    with replacing_directory(target) as temporary:
        (temporary / "new").write_text("new")
        assert names(target) == {"old"}
    assert names(tmp_path) == {"out"}
    assert names(target) == {"new"}
