"""Adapters that no block can take exactly, merged into GGUF files: against numpy, gguf-py and llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lorafit.cli import main
from lorafit.commands.merge import merge
from lorafit.config import LoRA, QLoRA
from lorafit.errors import MergeError
from lorafit.merging import Certificate, HeldOut, apply, certify, plan, verify
from lorafit.models.load import load
from tests.adapters.test_forms import FORMS, logits, peft_model
from tests.merging.runs import write_run
from tests.merging.test_exact import in_file, tensors, updates
from tests.oracles.family_gguf import random_model, write_family
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

CONFIG = LoRA(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny.gguf", formats={"1.ffn_down": "Q8_0"})


@pytest.fixture(scope="module")
def run(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny.path, CONFIG, size=0.05)


def dense(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def sums(base: Path, run: Path) -> dict[str, np.ndarray]:
    """Name in the file -> weight with its update, float64, rows as the file has them."""
    before = tensors(base)
    changed = dict(in_file(name, update) for name, update in updates(run).items())
    return {name: dense(before[name]).astype(np.float64) + update for name, update in changed.items()}


@pytest.mark.parametrize("requantize", ["keep", "q4_1", "q5_1", "q8_0", "f16"])
def test_weights_are_the_rounded_sum(tiny: TinyLlama, run: Path, tmp_path: Path, requantize: Any) -> None:
    planned = plan(run, requantize=requantize)
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    before, after, wanted = tensors(tiny.path), tensors(tmp_path / "tuned.gguf"), sums(tiny.path, run)
    assert len(wanted) == 14
    for name, weight in wanted.items():
        kind = before[name].tensor_type
        kind = kind if requantize == "keep" else gguf.GGMLQuantizationType[requantize.upper()]
        assert after[name].tensor_type == kind
        plain = gguf.quants.dequantize(gguf.quants.quantize(weight.astype(np.float32), kind), kind)
        errors = [np.square(found - weight).mean() for found in (dense(after[name]), plain)]
        if kind == before[name].tensor_type:
            # On the grid of the base, rounded at random: the error is larger, but the update is there. The grid's ends
            # cut a little of it, and the noise is a few hundredths of it.
            update = weight - dense(before[name])
            moved = dense(after[name]) - dense(before[name])
            assert (moved * update).sum() == pytest.approx(np.square(update).sum(), rel=0.12)
            assert errors[0] <= 8 * errors[1]
            continue
        # What rounding by gguf-py leaves, or with the search less; sums in float32 are off by 1e-7 of weights below 1.
        assert errors[0] <= (0.95 if "_1" in kind.name else 1.0001) * errors[1] + 1e-14
        # As rows are random, one that lies elsewhere would be off by more than its own size.
        assert errors[0] < 0.02 * np.square(weight).mean()
    for name, tensor in before.items():
        if name not in wanted:
            np.testing.assert_array_equal(tensor.data, after[name].data)


def test_plain_rounding_can_be_had_for_comparison(tiny: TinyLlama, run: Path, tmp_path: Path) -> None:
    planned = plan(run, requantize="q4_1", packing="rounding")
    apply(planned, tmp_path / "tuned.gguf")
    certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
    assert certificate.requantized is not None
    assert certificate.requantized.dithered == 0
    kind = gguf.GGMLQuantizationType.Q4_1
    same = []
    for name, weight in sums(tiny.path, run).items():
        found = tensors(tmp_path / "tuned.gguf")[name].data
        same.append((found == gguf.quants.quantize(weight.astype(np.float32), kind)).mean())
    # A sum that ends in another bit may round to the neighbour.
    assert min(same) > 0.98
    planned = plan(run, requantize="q4_1", packing="search")
    apply(planned, tmp_path / "searched.gguf")
    searched = certify(planned, tmp_path / "searched.gguf", "searched.gguf").requantized
    assert searched is not None
    assert searched.relative_error < 0.97 * certificate.requantized.relative_error


def certify_merge(run: Path, output: Path, **options: Any) -> Certificate:
    certificate = merge(str(run), str(output), **options)
    assert isinstance(certificate, Certificate)
    return certificate


def test_the_certificate_has_base_run_and_file(tiny: TinyLlama, run: Path, tmp_path: Path) -> None:
    certificate = certify_merge(run, tmp_path / "tuned.gguf", requantize="q5_1", certificate_tolerance=1.0)
    held_out, rounded = certificate.held_out, certificate.requantized
    assert isinstance(held_out, HeldOut)
    assert rounded is not None
    assert rounded.formats == {"Q4_1 to Q5_1": 13, "Q8_0 to Q5_1": 1}
    assert (certificate.method, certificate.weights.bit_identical, certificate.weights.tensors) == ("lora", False, 0)
    from tests.merging.test_directory import loss

    for path, stated in ((tiny.path, held_out.base_loss), (run, held_out.run_loss)):
        assert stated == loss(path, run)
    assert held_out.merged_loss == loss(tmp_path / "tuned.gguf", run)
    assert len({held_out.base_loss, held_out.run_loss, held_out.merged_loss}) == 3
    # Independently of the certificate: what the loaded file has, against the sums.
    wanted, after = sums(tiny.path, run), tensors(tmp_path / "tuned.gguf")
    error = sum(np.square(dense(after[name]) - weight).sum() for name, weight in wanted.items())
    size = sum(np.square(weight).sum() for weight in wanted.values())
    assert rounded.relative_error == pytest.approx((error / size) ** 0.5, rel=1e-4)


def test_llamacpp_computes_what_lorafit_does(run: Path, tmp_path: Path) -> None:
    certify_merge(run, tmp_path / "tuned.gguf", requantize="f32")
    tokens = list(range(40, 80))
    with torch.no_grad():
        of_run, of_file = (
            load(path, compute="fp32")[0](torch.tensor([tokens])).logits[0] for path in (run, tmp_path / "tuned.gguf")
        )
    # One product with a sum of matrices against a sum of two products, in float32, on logits of size 10.
    torch.testing.assert_close(of_file, of_run, rtol=0, atol=2e-4)
    found = LlamaCppOracle(tmp_path / "tuned.gguf").logits(tokens)
    # The head is Q8_0, before which llama.cpp quantises activations.
    assert np.abs(found - of_file.numpy()).mean() < 0.05
    certify_merge(run, tmp_path / "small.gguf", requantize="keep", certificate_tolerance=1.0)
    with torch.no_grad():
        expected = load(tmp_path / "small.gguf", compute="fp32")[0](torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(LlamaCppOracle(tmp_path / "small.gguf").logits(tokens) - expected).mean() < 0.15


def test_a_file_in_full_precision_needs_no_format(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "tiny.gguf", format="F32").path
    run = write_run(tmp_path / "run", base, CONFIG)
    certificate = certify_merge(run, tmp_path / "tuned.gguf")
    assert certificate.requantized is not None
    assert certificate.requantized.relative_error == 0.0
    for name, weight in sums(base, run).items():
        # A sum in float32 of numbers below 4.
        np.testing.assert_allclose(dense(tensors(tmp_path / "tuned.gguf")[name]), weight, rtol=0, atol=1e-6)


BOTH = (
    *("embedding and head", "an embedding", "a head", "tokens of the head", "different tokens of both"),
    *("an embedding by LoRA", "embedding and head by LoRA"),
)  # forms that leave a tied embedding and head different from one another


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_peft_writes_or_a_refusal(tmp_path: Path, form: str, tied: bool) -> None:
    base = write_tiny_llama(tmp_path / "tiny.gguf", tied=tied)
    peft = peft_model(base.dense(), FORMS[form])
    peft.save_pretrained(tmp_path / "peft")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(base.path)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(fields))
    if "norms" in form or (tied and form in BOTH):
        complaint = (
            "trained the weight of .*norm and [24] more like it, but .* changes matrices only"
            if "norms" in form
            else "would change both; merge into a directory"
        )
        with pytest.raises(MergeError, match=complaint):
            plan(tmp_path / "peft", requantize="f32")
        return
    planned = plan(tmp_path / "peft", requantize="f32")
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    with torch.no_grad():
        found = load(tmp_path / "tuned.gguf", compute="fp32")[0]
        torch.testing.assert_close(logits(found), logits(peft), rtol=0, atol=1e-4)


def test_experts_go_to_their_tensors(tmp_path: Path) -> None:
    base = write_family(tmp_path / "moe.gguf", "qwen3moe", random_model("qwen3moe"), format="Q8_0")
    run = write_run(tmp_path / "run", base, CONFIG, size=0.1, held_out=False)
    certify_merge(run, tmp_path / "tuned.gguf", requantize="f32")
    ids = torch.arange(40, 80).unsqueeze(0)
    with torch.no_grad():
        of_run, of_file, of_base = (
            load(path, compute="fp32")[0](ids).logits for path in (run, tmp_path / "tuned.gguf", base)
        )
    torch.testing.assert_close(of_file, of_run, rtol=0, atol=1e-3)
    assert float((of_base - of_run).abs().mean()) > 0.1


def test_what_is_refused(tiny: TinyLlama, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "tuned.gguf")
    with pytest.raises(MergeError, match=r"with --method lora, whose .* --requantize keep or q8_0, or ship .*adapter"):
        plan(run)
    with pytest.raises(MergeError, match="has no effect on a GGUF file; give --requantize instead"):
        merge(str(run), output, dtype="bf16")
    with pytest.raises(MergeError, match="has no effect on a GGUF file; give a directory instead"):
        merge(str(run), output, onto=str(tiny.path))
    with pytest.raises(MergeError, match="--requantize q8_0 has no effect on a directory"):
        merge(str(run), str(tmp_path / "out"), requantize="q8_0")
    with pytest.raises(MergeError, match="--dtype is fp8, but must be one of fp32, bf16, fp16"):
        merge(str(run), str(tmp_path / "out"), dtype="fp8")  # type: ignore[arg-type]
    write_tiny_directory(tmp_path / "dense")
    whole = write_run(tmp_path / "whole", tmp_path / "dense", LoRA(rank=2))
    with pytest.raises(MergeError, match="is no GGUF file to merge into; merge into a directory and export that"):
        merge(str(whole), output, requantize="q8_0")
    nf4 = write_run(tmp_path / "nf4", tmp_path / "dense", QLoRA(rank=2), quantize="nf4")
    with pytest.raises(MergeError, match=r"as it is after --quantize nf4: .* merge into a directory and export that"):
        merge(str(nf4), output, requantize="q8_0")
    capsys.readouterr()
    assert main(["merge", str(run), output]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "whole", "nf4"}


def test_too_much_loss_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    output, worse = tmp_path / "tuned.gguf", {}
    for requantize in ("q4_0", "q4_1", "q5_0"):  # by chance rounding may lower the loss
        planned = plan(run, requantize=requantize, certificate_tolerance=10.0)  # type: ignore[arg-type]
        apply(planned, tmp_path / "temporary")
        held_out = certify(planned, tmp_path / "temporary", "tuned.gguf").held_out
        assert isinstance(held_out, HeldOut)
        worse[held_out.merged_loss - held_out.run_loss] = requantize
    (tmp_path / "temporary").unlink()
    most = max(worse)
    assert most > 0
    with pytest.raises(MergeError, match=rf"--requantize {worse[most]} raised .* by more than --certificate-tolerance"):
        merge(str(run), str(output), requantize=worse[most], certificate_tolerance=most / 2)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    certify_merge(run, output, requantize=worse[most], certificate_tolerance=most)


def test_it_is_not_merged_twice(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "tiny.gguf").path
    run = write_run(tmp_path / "run", base, CONFIG, held_out=False)
    certify_merge(run, tmp_path / "tuned.gguf", requantize="keep")
    (tmp_path / "tuned.gguf").replace(base)
    with pytest.raises(MergeError, match="another model, or one that was merged already"):
        plan(run, requantize="keep")


def test_what_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "tuned.gguf")
    assert main(["merge", str(run), output, "--requantize", "q8_0"]) == 0
    said, losses = " ".join(capsys.readouterr().out.split()), json.loads(Path(f"{output}.certificate.json").read_text())
    losses = losses["held_out"]
    assert (
        "13 from Q4_1 to Q8_0, 1 from Q8_0 to Q8_0: update added, rounded anew, 1 at random onto the grid that they "
        "had; weights off by 0." in said
    )
    assert "6 tensors and all metadata are those of tiny.gguf; the size changes by +" in said  # norms and embedding
    assert (
        f"{losses['base_loss']:.4f} for the base, {losses['run_loss']:.4f} for the run and "
        f"{losses['merged_loss']:.4f} for the file ({losses['merged_loss'] - losses['run_loss']:+.4f})"
    ) in said
    assert "bit-identical" not in said
