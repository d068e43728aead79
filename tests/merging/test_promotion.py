"""Merging into a format that the base does not have: Q4_0, Q5_0, Q4_K and Q5_K become Q4_1 and Q5_1."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lorafit.config import QALoRA
from lorafit.containers.gguf import GGUFFile
from lorafit.errors import MergeError, ModelError
from lorafit.merging import Plan, apply, certify, plan, verify
from lorafit.merging.certificate import HeldOut
from lorafit.merging.engine import Answers, InLlamaCpp
from lorafit.models.load import load
from tests.merging.runs import write_run
from tests.merging.test_exact import in_file, tensors, updates
from tests.oracles.family_gguf import KINDS as KINDS_OF_FAMILIES
from tests.oracles.family_gguf import random_model, write_family
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

PROMOTED = {"Q4_0": "Q4_1", "Q5_0": "Q5_1", "Q4_K": "Q4_1", "Q5_K": "Q5_1"}
# As Q4_K_M and its like have it: a file of several formats, some of which have no offsets.
MIXED = {"ffn_down": "Q6_K", "0.attn_v": "Q5_0", "1.attn_v": "Q8_0", "1.attn_q": "Q5_K", "1.attn_k": "Q4_1"}
KINDS = [*PROMOTED, "mixed"]


def write_base(path: Path, kind: str) -> TinyLlama:
    if kind == "mixed":
        return write_tiny_llama(path, hidden=256, intermediate=256, format="Q4_K", formats=MIXED)  # type: ignore[arg-type]
    size = 256 if kind.endswith("K") else 64
    return write_tiny_llama(path, hidden=size, intermediate=size, format=kind)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_base(tmp_path_factory.mktemp("base") / "tiny.gguf", request.param)


@pytest.fixture(scope="module")
def run(base: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base.path, size=0.2)


@pytest.fixture(scope="module")
def planned(run: Path) -> Plan:
    return plan(run)


@pytest.fixture(scope="module")
def merged(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "tuned.gguf"
    apply(planned, path)
    verify(planned, path)
    return path


def test_weights_are_base_plus_update_in_the_promoted_format(base: TinyLlama, run: Path, merged: Path) -> None:
    before, after = tensors(base.path), tensors(merged)
    changed = dict(in_file(name, update) for name, update in updates(run).items())
    for name, old in before.items():
        new = after[name]
        assert list(new.shape) == list(old.shape)
        if name not in changed:
            assert new.tensor_type == old.tensor_type
            np.testing.assert_array_equal(new.data, old.data)
            continue
        assert new.tensor_type.name == PROMOTED.get(old.tensor_type.name, old.tensor_type.name)
        size = 20 if new.tensor_type.name == "Q4_1" else 24
        halves = np.ascontiguousarray(new.data).reshape(len(new.data), -1, size)[..., :4].copy().view("<f2")
        d, m = (np.abs(np.repeat(halves[..., i].astype(np.float64), 32, axis=1)) for i in range(2))
        # m' is rounded to half precision; of K-quants d and m before, too. 2^-11 of its size each time, and what else
        # rounds does so in float32.
        weights, shift = gguf.quants.dequantize(old.data, old.tensor_type), changed[name]
        tolerance = m * 2.0**-11 + 1e-6
        if old.tensor_type.name.endswith("K"):
            tolerance += (d * 31 + m + np.abs(shift)) * 2.0**-11
        difference = np.abs(gguf.quants.dequantize(new.data, new.tensor_type) - (weights + shift))
        assert (difference <= tolerance).all(), name
        assert np.abs(shift).mean() > 20 * tolerance.mean(), "an update this small would not show"


def test_metadata_and_order_are_kept(base: TinyLlama, merged: Path) -> None:
    before, after = gguf.GGUFReader(base.path), gguf.GGUFReader(merged)
    assert list(before.fields) == list(after.fields)
    for name, field in before.fields.items():
        assert [part.tobytes() for part in field.parts] == [part.tobytes() for part in after.fields[name].parts]
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 40])  # one token may take a fused kernel
def test_logits_are_those_of_the_run_to_the_last_bit(run: Path, merged: Path, compute: str, length: int) -> None:
    tokens = torch.arange(40, 40 + length).unsqueeze(0)
    with torch.no_grad():
        logits = [load(path, compute=compute)[0](tokens).logits for path in (run, merged)]  # type: ignore[arg-type]
    assert torch.equal(*logits)


def test_llamacpp_computes_what_lorafit_does(base: TinyLlama, merged: Path) -> None:
    tokens = list(range(40, 80))
    with torch.no_grad():
        ours = load(merged, compute="fp32")[0](torch.tensor([tokens])).logits[0].numpy()
        before = load(base.path, compute="fp32")[0](torch.tensor([tokens])).logits[0].numpy()
    found = LlamaCppOracle(merged).logits(tokens)
    # llama.cpp quantises activations to 8 bits: measured 0.02 to 0.06, where the update moves logits by 0.5 and more.
    assert np.abs(found - ours).mean() < 0.15 < 0.3 < np.abs(before - ours).mean()


def test_the_certificate_says_what_was_promoted(base: TinyLlama, run: Path, planned: Plan, merged: Path) -> None:
    certificate = certify(planned, merged, "tuned.gguf")
    sizes = base.path.stat().st_size, merged.stat().st_size
    assert (certificate.base.size, certificate.merged.size) == sizes
    assert sizes[1] > sizes[0]
    weights = certificate.weights
    before = tensors(base.path)
    changed = [in_file(name, update)[0] for name, update in updates(run).items()]
    expected: dict[str, int] = {}
    for name in changed:
        source = before[name].tensor_type.name
        if source in PROMOTED:
            expected[f"{source} to {PROMOTED[source]}"] = expected.get(f"{source} to {PROMOTED[source]}", 0) + 1
    assert weights.promoted == expected
    assert weights.tensors == len(changed)
    assert weights.untouched == len(before) - len(changed)
    assert weights.bit_identical
    assert certificate.requantized is None
    assert isinstance(certificate.held_out, HeldOut)
    assert certificate.held_out.run_loss == certificate.held_out.merged_loss
    assert isinstance(certificate.llamacpp, InLlamaCpp)
    assert isinstance(certificate.llamacpp.answers, Answers)
    # llama.cpp's own loss of the file, by its way of rounding.
    assert certificate.llamacpp.answers.merged_loss == pytest.approx(certificate.held_out.merged_loss, abs=0.5)


@pytest.mark.parametrize("place", ["metadata", "table", "scale", "integer", "offset", "frozen", "last"])
def test_a_single_wrong_bit_is_seen(planned: Plan, merged: Path, tmp_path: Path, place: str) -> None:
    file = GGUFFile.open(merged)
    tensor, frozen = (file.tensors[name].offset for name in ("blk.1.ffn_up.weight", "token_embd.weight"))
    block = 24 if file.tensors["blk.1.ffn_up.weight"].format == "Q5_1" else 20
    data = bytearray(merged.read_bytes())
    at = {
        "metadata": 40, "table": file.table_at + 8, "scale": tensor + block, "integer": tensor + 2 * block - 1,
        "offset": tensor + block + 2, "frozen": frozen, "last": len(data) - 1,
    }  # fmt: skip
    data[at[place]] ^= 1
    (tmp_path / "spoilt.gguf").write_bytes(data)
    what = "1 bytes of offsets and 0 others" if place == "offset" else "0 bytes of offsets and 1 others"
    with pytest.raises(MergeError, match=what):
        verify(planned, tmp_path / "spoilt.gguf")


@pytest.mark.parametrize("family", KINDS_OF_FAMILIES)
def test_every_family_merges_into_promoted_formats(family: str, tmp_path: Path) -> None:
    """Rows in another order, fused projections, biases, experts: what differs between families, all at once."""
    model = write_family(tmp_path / "base.gguf", family, random_model(family), format="Q4_0")
    planned = plan(write_run(tmp_path / "run", model, QALoRA(rank=1, alpha=2.0), size=0.3))
    apply(planned, tmp_path / "tuned.gguf")
    certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
    assert certificate.weights.promoted == {"Q4_0 to Q4_1": len(planned.changes)}
    assert isinstance(certificate.held_out, HeldOut)
    assert certificate.held_out.run_loss == certificate.held_out.merged_loss
    assert isinstance(certificate.llamacpp, InLlamaCpp)
    tokens = list(range(40, 80))
    with torch.no_grad():
        of_run, of_base = (
            load(path, compute="fp32")[0](torch.tensor([tokens])).logits[0].numpy()
            for path in (tmp_path / "run", model)
        )
    # llama.cpp quantises activations to 8 bits, which may move logits by less than half of what the update does.
    found = LlamaCppOracle(tmp_path / "tuned.gguf").logits(tokens)
    assert np.abs(found - of_run).mean() < 0.5 * np.abs(of_base - of_run).mean()


def test_a_base_that_was_replaced_is_refused(base: TinyLlama, tmp_path: Path) -> None:
    copy = tmp_path / "base.gguf"
    shutil.copy(base.path, copy)
    run = write_run(tmp_path / "run", copy, held_out=False)
    planned = plan(run)
    apply(planned, tmp_path / "tuned.gguf")
    shutil.copy(tmp_path / "tuned.gguf", copy)
    with pytest.raises(ModelError, match="changed after it was loaded"):
        apply(planned, tmp_path / "again.gguf")
    with pytest.raises(MergeError, match=r"cannot be compared with|is not the base"):
        verify(planned, tmp_path / "tuned.gguf")
    with pytest.raises(MergeError, match=r"base\.gguf is not what .*run was trained on"):
        plan(run)
