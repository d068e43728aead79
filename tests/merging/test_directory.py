"""Merges into safetensors, against transformers with PEFT, gguf-py, and the blocks of the exact merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit import formats
from lorafit.commands.merge import merge
from lorafit.config import AdapterConfig, LoRA, QLoRA
from lorafit.data.chat import encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import read_examples
from lorafit.errors import LorafitWarning, MergeError, MissingFileError
from lorafit.evaluation.loss import evaluate
from lorafit.merging import DirectoryCertificate, HeldOut
from lorafit.models.load import load, load_base
from tests.adapters.test_forms import FORMS, logits, peft_model
from tests.merging.runs import spoil, write_run
from tests.merging.test_exact import updates
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "original"
    write_tiny_directory(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def beside_nf4(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = QLoRA(rank=2, alpha=4.0)
    return write_run(tmp_path_factory.mktemp("runs") / "nf4", dense, config, size=0.05, quantize="nf4")


def merged(run: Path, output: Path, **options: Any) -> tuple[DirectoryCertificate, dict[str, Tensor]]:
    certificate = merge(str(run), str(output), **options)
    assert isinstance(certificate, DirectoryCertificate)
    return certificate, load_file(output / "model.safetensors")


def by_peft(base: Path, run: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return dict(PeftModel.from_pretrained(model, str(run / "adapter")).merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "config",
    [LoRA(rank=2, alpha=4.0), LoRA(rank=4, alpha=4.0, scaling="rslora", dropout=0.1, targets="q_proj,down_proj")],
)
def test_in_fp32_it_is_what_peft_merges(dense: Path, tmp_path: Path, config: AdapterConfig) -> None:
    run = write_run(tmp_path / "run", dense, config)
    certificate, found = merged(run, tmp_path / "out")
    expected, before = by_peft(dense, run), load_file(dense / "model.safetensors")
    assert found.keys() == before.keys()
    for name, weight in found.items():
        # The same products and sum in float32, in another order: units of weights of 3 at most are 2.4e-7.
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    changed = {name for name, weight in found.items() if not torch.equal(weight, before[name])}
    assert certificate.changed == len(changed) == (14 if config.targets == "all-linear" else 4)
    assert min((found[name] - before[name]).diff(dim=0).abs().mean() for name in changed) > 0.01, "rows are alike"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_peft_writes(tmp_path: Path, form: str, tied: bool) -> None:
    """An adapter that comes without a run, and says nothing about its base but where it lies."""
    base = write_tiny_llama(tmp_path / "tiny.gguf", tied=tied)
    peft = peft_model(base.dense(), FORMS[form])
    peft.save_pretrained(tmp_path / "peft")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(base.path)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(fields))
    certificate = merge(str(tmp_path / "peft"), str(tmp_path / "out"))
    assert isinstance(certificate, DirectoryCertificate)
    assert not certificate.base_checked
    found, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), logits(peft)
    # float32 through two layers, on logits of size 10.
    torch.testing.assert_close(logits(found), before, rtol=0, atol=1e-4)
    theirs = peft.merge_and_unload()
    still = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    whole = {name.split(".")[-1] for name in FORMS[form].get("modules_to_save", ())}
    # An update of one of the two that are one.
    apart = form in ("tokens of the head", "different tokens of both") or "by LoRA" in form
    assert still == (tied and not apart and not whole & {"lm_head", "embed_tokens"})
    if tied and apart:
        # PEFT writes what is the head's or the embedding's into both, and is then another model than it was.
        assert float((logits(theirs) - before).abs().max()) > 1e-3
        return
    for name, weight in found.state_dict().items():
        # As above; DoRA divides by the length of a row, of which it has float32.
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_onto_the_unpacked_blocks_of_a_gguf_file(tiny: TinyLlama, tmp_path: Path) -> None:
    """Whose rows of q and k lie in another order."""
    run = write_run(tmp_path / "run", tiny.path, LoRA(rank=2, alpha=4.0))
    _, found = merged(run, tmp_path / "out")
    added = updates(run)
    assert len(added) == 14
    for name, weight in tiny.weights.items():
        wanted = weight + added.get(name, 0.0)
        # A sum of three numbers in float32, of size 3 at most, against float64.
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=0, atol=1e-6)
    assert found.keys() == tiny.weights.keys()


def test_onto_weights_that_were_quantised_while_they_were_loaded(dense: Path, beside_nf4: Path, tmp_path: Path) -> None:
    certificate, found = merged(beside_nf4, tmp_path / "out")
    before, added = load_file(dense / "model.safetensors"), updates(beside_nf4)
    for name, weight in before.items():
        if name in added:
            packed = formats.quantize(weight, "NF4_DQ")
            base = formats.dequantize(packed.blocks, "NF4_DQ", tuple(weight.shape), constants=packed.constants)
            assert not torch.equal(base, weight)
            wanted = base + torch.from_numpy(added[name]).float()
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found[name], weight)
    assert certificate.quantize == "nf4"
    assert certificate.onto is None


def test_onto_what_bitsandbytes_quantised(tmp_path: Path) -> None:
    from tests.models.test_bitsandbytes import quantized_here

    write_tiny_directory(tmp_path / "dense")
    base = quantized_here(tmp_path / "dense", tmp_path / "model", block=64, nested=True, kind="nf4")
    run = write_run(tmp_path / "run", tmp_path / "model", QLoRA(rank=2, alpha=4.0))
    _, found = merged(run, tmp_path / "out")
    for name, update in updates(run).items():
        np.testing.assert_allclose(found[name].numpy(), base[name].numpy() + update, rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in settings
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("format_name", ["Q4_1", "Q4_0"])
def test_qalora_is_the_exact_merge_unpacked(tmp_path: Path, format_name: Any) -> None:
    base = write_tiny_llama(tmp_path / "tiny.gguf", format=format_name).path
    run = write_run(tmp_path / "run", base)
    merge(str(run), str(tmp_path / "tuned.gguf"))
    _, found = merged(run, tmp_path / "out")
    _, of_file = load(tmp_path / "tuned.gguf"), gguf.GGUFReader(tmp_path / "tuned.gguf")
    exact = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in of_file.tensors}
    for layer in range(2):
        for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            mine = found[f"model.layers.{layer}.{ours}.weight"].numpy()
            np.testing.assert_array_equal(mine, exact[f"blk.{layer}.{theirs}.weight"])
    for name, weight in found.items():  # q and k too, whose rows the file has in another order
        if name.endswith("proj.weight"):
            packed = load(tmp_path / "tuned.gguf")[0].get_submodule(name.removesuffix(".weight")).packed
            assert torch.equal(weight, packed.dense(torch.float32))


def test_offsets_of_another_adapter_are_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny.path)
    layer = "model.layers.0.self_attn.q_proj"
    spoil(run, lambda offsets: offsets.update({layer: offsets[layer][::-1].copy()}))
    with pytest.raises(MergeError, match="not those of its adapter"):
        merge(str(run), str(tmp_path / "out"))


@pytest.mark.parametrize(("dtype", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_smaller_types_round_the_sum_once(beside_nf4: Path, tmp_path: Path, dtype: str, type_: torch.dtype) -> None:
    _, whole = merged(beside_nf4, tmp_path / "whole")
    certificate, found = merged(beside_nf4, tmp_path / "out", dtype=dtype)
    error = size = largest = 0.0
    for name, weight in whole.items():
        assert torch.equal(found[name], weight.to(type_)), name
        gap = found[name].double() - weight.double()
        error, size = error + float(gap.square().sum()), size + float(weight.double().square().sum())
        largest = max(largest, float(gap.abs().max()))
    assert certificate.rounding.largest == pytest.approx(largest, rel=1e-6)
    assert certificate.rounding.relative == pytest.approx((error / size) ** 0.5, rel=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(type_).removeprefix("torch.")


def loss(model: Path, run: Path) -> float:
    loaded, tokenizer = load(model)
    return evaluate(loaded, split_passes(encode_all(read_examples(run / "heldout.jsonl"), tokenizer), 2048)).loss


def test_losses_are_those_of_base_run_and_directory(dense: Path, beside_nf4: Path, tmp_path: Path) -> None:
    certificate, _ = merged(beside_nf4, tmp_path / "out")
    held_out = certificate.held_out
    assert isinstance(held_out, HeldOut)
    # What is mapped and what is loaded are the same numbers, which other products may add up in another order.
    assert held_out.run_loss == pytest.approx(loss(beside_nf4, beside_nf4), abs=1e-4)
    assert held_out.merged_loss == pytest.approx(loss(tmp_path / "out", beside_nf4), abs=1e-4)
    base, tokenizer = load(dense, quantize="nf4")
    documents = encode_all(read_examples(beside_nf4 / "heldout.jsonl"), tokenizer)
    assert held_out.base_loss == pytest.approx(evaluate(base, split_passes(documents, 2048)).loss, abs=1e-4)
    assert abs(held_out.base_loss - held_out.run_loss) > 0.01
    assert abs(held_out.merged_loss - held_out.run_loss) < 0.02  # bfloat16, where the processor has it
    assert held_out.tokens == sum(sum(document.trained) for document in documents)


def test_tokenizer_template_and_settings_come_along(tiny: TinyLlama, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny.path, LoRA(rank=2))
    merge(str(run), str(tmp_path / "out"))
    ours, theirs = load(tiny.path)[1], AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "The miller's 3 sons?"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_several_files(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.models.saving.SHARD_BYTES", 200_000)
    run = write_run(tmp_path / "run", dense, LoRA(rank=2))
    certificate = merge(str(run), str(tmp_path / "out"))
    assert isinstance(certificate, DirectoryCertificate)
    assert len(certificate.files) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in by_peft(dense, run).items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["directory", "gguf"])
def test_an_adapted_head_is_no_longer_tied(dense: Path, tiny: TinyLlama, tmp_path: Path, base: str) -> None:
    source = dense if base == "directory" else tiny.path
    run = write_run(tmp_path / "run", source, LoRA(rank=2, targets="lm_head"))
    _, found = merged(run, tmp_path / "out", certificate_tolerance=1.0)
    head, table = found["lm_head.weight"], found["model.embed_tokens.weight"]
    update = torch.from_numpy(updates(run)["lm_head.weight"]).float() * 16.0  # alpha 32, rank 2
    torch.testing.assert_close(head, table + update / 2.0, rtol=1e-5, atol=1e-5)  # updates() has a scale of 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, table)


def test_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    write_tiny_directory(
        tmp_path / "moe", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
    )
    run = write_run(tmp_path / "run", tmp_path / "moe", LoRA(rank=2, alpha=4.0), size=0.1)
    merge(str(run), str(tmp_path / "out"), certificate_tolerance=1.0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected, before = by_peft(tmp_path / "moe", run), AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        if "experts." in name:
            assert not torch.equal(weight, found[name])


def test_what_was_merged_says_so_and_is_not_merged_again(dense: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    run = write_run(tmp_path / "run", base, LoRA(rank=2))
    certificate, _ = merged(run, tmp_path / "out")
    note = json.loads((tmp_path / "out" / "config.json").read_text())["lorafit_merged"]
    assert [(merge["run"], merge["base_tensors_sha256"]) for merge in note] == [
        ("run", certificate.base_tensors_sha256)
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lorafit_merged"]) == note
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "out", base)
    with pytest.raises(MergeError, match=r"base is not what .*run was trained on .*: run was merged into it already"):
        merge(str(run), str(tmp_path / "again"))
    # Another run may start from it, and is merged into it as into any model.
    second = write_run(tmp_path / "second", base, LoRA(rank=2), seed=2)
    merge(str(second), str(tmp_path / "further"))
    note = json.loads((tmp_path / "further" / "config.json").read_text())["lorafit_merged"]
    assert [merge["run"] for merge in note] == ["run", "second"]
    assert not (tmp_path / "again").exists()


def test_another_base_is_refused_and_the_same_one_in_other_files_is_not(dense: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    run = write_run(tmp_path / "run", base, LoRA(rank=2))
    shutil.rmtree(base)
    write_tiny_directory(base, seed=5)
    with pytest.raises(MergeError, match="another model"):
        merge(str(run), str(tmp_path / "out"))
    shutil.rmtree(base)
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.save_pretrained(base, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 1
    merge(str(run), str(tmp_path / "out"))


def test_a_base_that_the_adapter_only_names(dense: Path, tmp_path: Path) -> None:
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    peft.peft_config["default"].base_model_name_or_path = "hub/model"
    adapter = tmp_path / "run" / "adapter"
    peft.save_pretrained(adapter)
    with pytest.raises(MissingFileError, match=r"on hub/model, which is not here; say where it is, as in .* --base"):
        merge(str(adapter), str(tmp_path / "out"))
    with pytest.warns(LorafitWarning, match="names hub/model as its base and holds no hash"):
        certificate, found = merged(adapter, tmp_path / "out", base=str(dense))
    assert not certificate.base_checked
    for name, weight in by_peft(dense, adapter.parent).items():
        torch.testing.assert_close(found.get(name, weight), weight, rtol=0, atol=1e-6)
    assert certificate.changed == 4


def test_onto_the_original(dense: Path, beside_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorafit.cli import main

    assert main(["merge", str(beside_nf4), str(tmp_path / "out"), "--onto", str(dense), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    found, before, added = (
        load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors"), updates(beside_nf4),
    )  # fmt: skip
    for name, weight in before.items():
        wanted = weight.numpy() + added.get(name, 0.0)
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=0, atol=1e-6)
    error = size = 0.0
    for name in added:
        packed = formats.quantize(before[name], "NF4_DQ")
        shape = tuple(before[name].shape)
        base = formats.dequantize(packed.blocks, "NF4_DQ", shape, constants=packed.constants).double()
        error += float((base - before[name]).square().sum())
        size += float(before[name].double().square().sum())
    onto = document["onto"]
    assert onto["relative_difference"] == pytest.approx((error / size) ** 0.5, rel=1e-5)
    assert onto["differing"] == len(added)
    assert onto["name"] == "original"
    assert onto["loss"] == pytest.approx(loss(dense, beside_nf4), abs=1e-4)
    assert document["held_out"]["merged_loss"] == pytest.approx(loss(tmp_path / "out", beside_nf4), abs=1e-4)
    assert (
        "warning: nf4 was trained beside original as nf4 and merged onto original, whose weights differ by "
        f"{onto['relative_difference']:.2%} (root mean square, {len(added)} tensors); held-out loss without the "
        f"adapter {onto['loss']:.4f}, and {document['held_out']['base_loss']:.4f} for original as nf4; without --onto"
    ) in captured.err
    assert load_base(tmp_path / "out", quantize="nf4").second_quantization is None


def test_what_is_no_original(dense: Path, tiny: TinyLlama, beside_nf4: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(MergeError, match="is quantised; give the original"):
        merge(str(beside_nf4), out, onto=str(tiny.path))
    write_tiny_directory(tmp_path / "other", seed=9)
    with pytest.raises(MergeError, match=r"no original of .*: their weights differ by 1[34]\d% of their size"):
        merge(str(beside_nf4), out, onto=str(tmp_path / "other"))
    write_tiny_directory(tmp_path / "smaller", num_hidden_layers=1)
    with pytest.raises(MergeError, match="it has other tensors"):
        merge(str(beside_nf4), out, onto=str(tmp_path / "smaller"))
    whole = write_run(tmp_path / "whole", dense, LoRA(rank=2))
    with pytest.raises(MergeError, match=r"was trained on .* in full precision, and merges onto that only"):
        merge(str(whole), out, onto=str(dense))
    merge(str(beside_nf4), out)
    with pytest.raises(MergeError, match="nf4 was merged into it already"):
        merge(str(beside_nf4), str(tmp_path / "again"), onto=out)
    assert not (tmp_path / "again").exists()


def test_quantising_it_again_is_labelled(beside_nf4: Path, tmp_path: Path) -> None:
    merge(str(beside_nf4), str(tmp_path / "out"))
    assert load_base(tmp_path / "out", quantize="nf4").second_quantization == "original (NF4_DQ)"


def test_too_much_loss_is_refused_and_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    for seed in range(8):
        run = write_run(tmp_path / "run", dense, LoRA(rank=2, alpha=8.0), seed=seed)
        certificate, _ = merged(run, tmp_path / "fine", dtype="bf16", certificate_tolerance=1.0, overwrite=True)
        assert isinstance(certificate.held_out, HeldOut)
        worse = certificate.held_out.merged_loss - certificate.held_out.run_loss
        if worse > 0:
            break
    with pytest.raises(MergeError, match=r"--dtype bfloat16 raised .* by more than --certificate-tolerance"):
        merge(str(run), str(tmp_path / "out"), dtype="bf16", certificate_tolerance=worse / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "fine", "fine.certificate.json"}
    merge(str(run), str(tmp_path / "out"), dtype="bf16", certificate_tolerance=worse)


def test_what_fp16_cannot_hold_is_refused(dense: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dense, LoRA(rank=2), size=1e5, held_out=False)
    with pytest.raises(MergeError, match=r"weight has weights that are too large for float16; choose --dtype fp32"):
        merge(str(run), str(tmp_path / "out"), dtype="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_without_held_out_rows(dense: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dense, LoRA(rank=2), held_out=False)
    certificate, _ = merged(run, tmp_path / "out")
    assert certificate.as_dict()["held_out"] == {"not_measured": "the run held no rows out: it has no heldout.jsonl"}
    with pytest.raises(MergeError, match=r"--certificate-tolerance 0\.1 has no effect: .* held no rows out"):
        merge(str(run), str(tmp_path / "other"), certificate_tolerance=0.1)
