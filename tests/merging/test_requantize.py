"""Plain LoRA on tensors without offsets, merged by rounding: against the same computed in numpy and gguf-py."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorafit.commands.merge import merge
from lorafit.config import QALoRA
from lorafit.containers.gguf import TensorInfo
from lorafit.errors import MergeError
from lorafit.merging import apply, certify, plan, verify
from lorafit.merging.certificate import HeldOut
from lorafit.merging.requantize import RoundedChange
from lorafit.models.load import load
from tests.merging.runs import write_run
from tests.merging.test_exact import in_file, tensors, updates
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import TinyLlama, quantize, write_tiny_llama

# Rows of q and k lie in another order in the file; the rest of the layers are Q4_0 and get promoted.
FROZEN = {"0.attn_q": "Q6_K", "1.attn_k": "Q8_0", "1.ffn_down": "Q6_K", "0.ffn_up": "F16"}
FORMATS = ["q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "bf16", "f16", "f32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    return write_tiny_llama(path, hidden=256, intermediate=256, format="Q4_0", formats=FROZEN)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(base: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = QALoRA(rank=2, alpha=4.0, frozen_tensors="lora")
    return write_run(tmp_path_factory.mktemp("runs") / "run", base.path, config, size=0.1)


@pytest.mark.parametrize("requantize", FORMATS)
def test_weights_are_the_rounded_sum(base: TinyLlama, run: Path, tmp_path: Path, requantize: str) -> None:
    planned = plan(run, requantize=requantize)  # type: ignore[arg-type]
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    before, after = tensors(base.path), tensors(tmp_path / "tuned.gguf")
    changed = dict(in_file(name, update) for name, update in updates(run).items())
    names = [name for name in changed if any(name.endswith(f"{kind}.weight") for kind in FROZEN)]
    assert len(names) == len(FROZEN)
    for name in names:
        old, new = before[name], after[name]
        kind = gguf.GGMLQuantizationType[requantize.upper()]
        assert new.tensor_type == kind
        wanted = gguf.quants.dequantize(old.data, old.tensor_type).astype(np.float64) + changed[name]
        error = np.abs(gguf.quants.dequantize(new.data, kind) - wanted)
        plain = np.abs(gguf.quants.dequantize(quantize(wanted.astype(np.float32), kind.name), kind) - wanted)
        if kind == old.tensor_type:  # rounded at random: each to one of the two neighbours, with twice the error
            assert (error**2).mean() <= 8 * (plain**2).mean()
            continue
        # No worse than gguf-py or ggml, give or take sums that differ in float32 (1e-7 of weights below 1).
        assert (error**2).mean() <= (plain**2).mean() * 1.0001 + 1e-14
        assert np.abs(changed[name]).mean() > 0.005
    for name, old in before.items():
        if name not in changed:
            np.testing.assert_array_equal(old.data, after[name].data)


def test_keep_keeps_the_format_of_each(tmp_path: Path) -> None:
    formats = {"attn_v": "Q8_0", "ffn_up": "Q4_0", "0.attn_k": "F16", "1.attn_q": "Q6_K"}
    base = write_tiny_llama(tmp_path / "base.gguf", hidden=256, formats=formats)  # type: ignore[arg-type]
    config = QALoRA(rank=2, targets="v_proj,k_proj,q_proj", frozen_tensors="lora")
    planned = plan(write_run(tmp_path / "run", base.path, config, held_out=False), requantize="keep")
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    before, after = tensors(base.path), tensors(tmp_path / "tuned.gguf")
    assert {name: tensor.tensor_type for name, tensor in before.items()} == {
        name: tensor.tensor_type for name, tensor in after.items()
    }
    for name in ("blk.0.attn_k.weight", "blk.1.attn_q.weight"):
        assert not np.array_equal(before[name].data, after[name].data)


def test_the_certificate_states_what_is_not_exact(base: TinyLlama, run: Path, tmp_path: Path) -> None:
    found = {}
    for requantize in ("q4_0", "q8_0", "f32"):
        planned = plan(run, requantize=requantize, certificate_tolerance=1.0)  # type: ignore[arg-type]
        apply(planned, tmp_path / "tuned.gguf")
        certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
        rounded, held_out = certificate.requantized, certificate.held_out
        assert rounded is not None
        assert isinstance(held_out, HeldOut)
        assert not rounded.exact
        assert rounded.tensors == len(FROZEN)
        target = requantize.upper()
        assert rounded.formats == {f"Q6_K to {target}": 2, f"Q8_0 to {target}": 1, f"F16 to {target}": 1}
        assert certificate.weights.tensors == 14 - len(FROZEN)
        assert certificate.weights.promoted == {"Q4_0 to Q4_1": 14 - len(FROZEN)}
        found[requantize] = rounded.relative_error, abs(held_out.merged_loss - held_out.run_loss)
    # Normal weights with the largest of 32 at 2 deviations: 4 bits step by a quarter of a deviation, and round by 7%;
    # 8 bits by a sixteenth of that, and some times more where they are rounded at random; float32 is off by what a sum
    # in another order is.
    assert 0.04 < found["q4_0"][0] < 0.12
    assert 0.002 < found["q8_0"][0] < 0.016
    assert found["f32"][0] < 1e-6
    assert found["q4_0"][1] > found["q8_0"][1] > 0
    # In bfloat16, where the processor has it, a sum is rounded otherwise than its parts.
    assert found["f32"][1] < 0.01


def test_run_and_file_compute_nearly_the_same_and_so_does_llamacpp(run: Path, tmp_path: Path) -> None:
    planned = plan(run, requantize="f32")
    apply(planned, tmp_path / "tuned.gguf")
    tokens = list(range(40, 80))
    with torch.no_grad():
        of_run, of_file = (
            load(path, compute="fp32")[0](torch.tensor([tokens])).logits[0] for path in (run, tmp_path / "tuned.gguf")
        )
    # One product with the sum of two matrices against the sum of two products, in float32.
    torch.testing.assert_close(of_file, of_run, rtol=0, atol=2e-4)
    found = LlamaCppOracle(tmp_path / "tuned.gguf").logits(tokens)
    # llama.cpp quantises activations where weights are quantised.
    assert np.abs(found - of_file.numpy()).mean() < 0.15


@pytest.mark.parametrize("rows", [1, 4, 7, 15])
def test_pieces_of_experts_are_cut_from_their_own_matrix(rows: int) -> None:
    matrices = torch.randn(3, 5, 32)
    asked: list[int] = []

    def matrix(number: int) -> torch.Tensor:
        asked.append(number)
        return matrices[number]

    info = TensorInfo("blk.0.ffn_down_exps.weight", "F32", (3, 5, 32), 0, matrices.nbytes)
    change = RoundedChange("experts", info, "F32", 5, matrix)
    blocks = torch.zeros(15, 128, dtype=torch.uint8)
    for _ in range(2):  # writing and comparing
        pieces = [change.convert(start, blocks[start : start + rows]) for start in range(0, len(blocks), rows)]
        assert torch.equal(torch.cat(pieces).view(torch.float32), matrices.flatten(0, 1))
    assert asked == [0, 1, 2, 0, 1, 2], "each is computed once, and not kept when all are written"


def test_what_is_refused(base: TinyLlama, run: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"plain LoRA on 4 layers .* in --requantize keep or q8_0, or ship .*adapter"):
        plan(run)
    read_only = write_tiny_llama(tmp_path / "read_only.gguf", hidden=256, formats={"0.attn_q": "Q3_K"})
    of_read_only = write_run(tmp_path / "of_read_only", read_only.path, QALoRA(rank=2, frozen_tensors="lora"))
    with pytest.raises(MergeError, match=r"attn_q\.weight is Q3_K, which lorafit .* does not write, .* one of q8_0"):
        plan(of_read_only, requantize="keep")
    with pytest.raises(MergeError, match="--requantize q3_k is not one of q8_0, "):
        plan(run, requantize="q3_k")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="--certificate-tolerance is -1, but must be at least 0"):
        plan(run, requantize="q8_0", certificate_tolerance=-1.0)
    exact = write_run(tmp_path / "exact", base.path, QALoRA(rank=2, targets="gate_proj"), held_out=False)
    with pytest.raises(MergeError, match="--requantize q8_0 has no effect"):
        plan(exact, requantize="q8_0")
    with pytest.raises(MergeError, match=r"--certificate-tolerance 0\.1 has no effect on .* merges exactly"):
        plan(exact, certificate_tolerance=0.1)
    unmeasured = write_run(tmp_path / "unmeasured", base.path, QALoRA(rank=2, frozen_tensors="lora"), held_out=False)
    with pytest.raises(MergeError, match=r"--certificate-tolerance 0\.1 has no effect: .* held no rows out"):
        plan(unmeasured, requantize="q8_0", certificate_tolerance=0.1)


def test_rows_that_do_not_fit_the_format(tmp_path: Path) -> None:
    base = write_tiny_llama(
        tmp_path / "base.gguf", hidden=64, intermediate=80, heads=2, format="Q4_1", formats={"ffn_down": "F16"}
    )
    run = write_run(tmp_path / "run", base.path, QALoRA(rank=2, frozen_tensors="lora"), held_out=False)
    with pytest.raises(MergeError, match=r"ffn_down\.weight: a row of 80 weights .* choose --requantize bf16, f16 or"):
        plan(run, requantize="q8_0")
    apply(plan(run, requantize="bf16"), tmp_path / "tuned.gguf")


def test_weights_too_large_for_the_format(base: TinyLlama, tmp_path: Path) -> None:
    config = QALoRA(rank=2, targets="q_proj", frozen_tensors="lora")
    run = write_run(tmp_path / "run", base.path, config, size=1e4, held_out=False)
    path = run / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] *= 1e4
    with safe_open(path, framework="np") as file:
        save_file(weights, path, file.metadata())
    with pytest.raises(MergeError, match=r"attn_q\.weight: its weights .* too large for F16; choose another"):
        apply(plan(run, requantize="f16"), tmp_path / "tuned.gguf")


def test_too_much_loss_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "tuned.gguf"
    with pytest.raises(
        MergeError, match=r"rounding to --requantize q4_0 raised .* --certificate-tolerance 0; choose a finer one"
    ):
        merge(str(run), str(output), requantize="q4_0", certificate_tolerance=0.0)
    assert not list(output.parent.iterdir())
    certificate = merge(str(run), str(output), requantize="q8_0")
    assert json.loads(Path(f"{output}.certificate.json").read_text()) == certificate.as_dict()


def test_the_stored_adapter_is_what_was_added(run: Path) -> None:
    """The plain LoRA of the run is in its file under the names that PEFT reads, and the offsets are not."""
    layers = ("0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.down_proj", "0.mlp.up_proj")
    names = {f"model.layers.{layer}" for layer in layers}
    assert names <= {name.removesuffix(".weight") for name in updates(run)}
    assert not names & load_file(run / "adapter/qalora_offsets.safetensors").keys()
