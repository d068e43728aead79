"""Certificates: figures against independent ones, and false claims that must not pass."""

import dataclasses
import hashlib
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from lorafit.data.chat import encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import read_examples
from lorafit.errors import MergeError
from lorafit.evaluation.llamacpp import LlamaCpp
from lorafit.evaluation.loss import evaluate
from lorafit.merging import Certificate, Plan, apply, certify, plan
from lorafit.merging.certificate import HeldOut
from lorafit.merging.engine import Answers, InLlamaCpp, NotMeasured
from lorafit.models.load import load
from tests.merging.runs import HELD_OUT, claim_to_be_a_part, spoil, to_neighbours, write_run
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import CHAT_TEMPLATE, TinyLlama, write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny.gguf")


@pytest.fixture(scope="module")
def run(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny.path)


@pytest.fixture(scope="module")
def planned(run: Path) -> Plan:
    return plan(run)


@pytest.fixture(scope="module")
def merged(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "temporary"
    apply(planned, path)
    return path


@pytest.fixture(scope="module")
def certificate(planned: Plan, merged: Path) -> Certificate:
    return certify(planned, merged, "tuned.gguf")


def test_files_and_bytes(certificate: Certificate, tiny: TinyLlama, merged: Path) -> None:
    before, after = tiny.path.read_bytes(), merged.read_bytes()
    for record, name, data in ((certificate.base, "tiny.gguf", before), (certificate.merged, "tuned.gguf", after)):
        assert (record.name, record.size) == (name, len(data))
        assert record.sha256 == hashlib.sha256(data).hexdigest()
    weights = certificate.weights
    assert weights.bit_identical
    assert weights.tensors == 14
    # Rows times blocks in a row: q, k, v, o, gate, up, down of a layer.
    assert weights.offsets == 2 * 2 * (64 + 32 + 32 + 64 + 128 + 128 + 2 * 64)
    assert weights.bytes_changed == sum(a != b for a, b in zip(before, after, strict=True))
    assert (certificate.run, certificate.method) == ("run", "qalora")


def test_loss_is_that_of_run_and_file(certificate: Certificate, run: Path, merged: Path) -> None:
    held_out = certificate.held_out
    assert isinstance(held_out, HeldOut)
    losses = []
    for path in (run, merged):
        model, tokenizer = load(path)
        documents = encode_all(read_examples(run / "heldout.jsonl"), tokenizer)
        losses.append(evaluate(model, split_passes(documents, 2048)).loss)
    assert [held_out.run_loss, held_out.merged_loss] == losses
    assert losses[0] == losses[1]
    assert held_out.rows == len(HELD_OUT)
    assert held_out.tokens == sum(sum(document.trained) for document in documents)


def test_llamacpp_figures(certificate: Certificate, tiny: TinyLlama, merged: Path) -> None:
    assert isinstance(certificate.llamacpp, InLlamaCpp)
    answers = certificate.llamacpp.answers
    assert isinstance(answers, Answers)
    shortest = min(HELD_OUT, key=lambda row: len(row[0]))[0]
    assert answers.prompt == [{"role": "user", "content": shortest}]
    for path, loss, answer in (
        (tiny.path, answers.base_loss, answers.base_answer),
        (merged, answers.merged_loss, answers.merged_answer),
    ):
        oracle = LlamaCppOracle(path)
        losses: list[float] = []
        lengths = []
        for question, reply in HELD_OUT:
            prompt = oracle.tokenize(chat(question), False, True)
            tokens = oracle.tokenize(reply + "<|im_end|>", False, True)
            lengths.append(len(tokens))
            logits = oracle.logits(prompt + tokens[:48], as_served=True)[len(prompt) - 1 : -1].astype(np.float64)
            scored = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            losses += [-scored[i, token] for i, token in enumerate(tokens[:48])]
        assert max(lengths) > 48 > min(lengths), "one answer should be cut"
        assert answers.tokens == len(losses)
        # llama.cpp computes a long sequence at once otherwise than token by token, which moves single tokens of the
        # long answer by up to 0.09 and the mean by 0.003; the mean of the answers' means would be 0.2 away.
        assert loss == pytest.approx(np.mean(losses), abs=0.01)
        with LlamaCpp(path, n_ctx=256) as model:
            assert answer == model.generate(answers.prompt, max_tokens=96)
    assert answers.rows == len(HELD_OUT)
    assert answers.answers_differ
    assert answers.base_answer != answers.merged_answer
    assert abs(answers.base_loss - answers.merged_loss) > 0.1


def chat(question: str) -> str:
    from jinja2 import Template

    messages = [{"role": "user", "content": question}]
    return Template(CHAT_TEMPLATE, keep_trailing_newline=True).render(messages=messages, add_generation_prompt=True)


def test_rows_in_a_wrong_place_are_seen(planned: Plan, tmp_path: Path) -> None:
    """A plan that takes the orders of file and model for the same: its file is what it says, and still wrong."""
    changes = tuple(dataclasses.replace(change, rows=None) for change in planned.changes)
    wrong = dataclasses.replace(planned, changes=changes)
    apply(wrong, tmp_path / "wrong.gguf")
    with pytest.raises(MergeError, match=r"tuned\.gguf is not kept: the weights of .*\.q_proj are not"):
        certify(wrong, tmp_path / "wrong.gguf", "tuned.gguf")


def test_another_loss_is_seen(planned: Plan, merged: Path, tmp_path: Path) -> None:
    """A file that has all adapted layers as they should be, and computes otherwise."""
    data = bytearray(merged.read_bytes())
    norm = planned.file.tensors["output_norm.weight"].offset
    data[norm : norm + 4] = struct.pack("<f", struct.unpack("<f", data[norm : norm + 4])[0] * 1.5)
    (tmp_path / "other.gguf").write_bytes(data)
    base = tmp_path / "base.gguf"
    data = bytearray(planned.base.path.read_bytes())
    data[norm : norm + 4] = struct.pack("<f", struct.unpack("<f", data[norm : norm + 4])[0] * 1.5)
    base.write_bytes(data)
    # So that the bytes agree, the plan must believe in a base that its model was not loaded from.
    other = dataclasses.replace(
        planned,
        base=dataclasses.replace(planned.base, path=base),
        base_sha256=hashlib.sha256(data).hexdigest(),
    )
    with pytest.raises(MergeError, match=r"tuned\.gguf is not kept: its held-out loss is .*, that of the run"):
        certify(other, tmp_path / "other.gguf", "tuned.gguf")


def test_stored_offsets_count_and_not_recomputed_ones(run: Path, tmp_path: Path) -> None:
    """As on another machine than the one that trained, where a few offsets round to their neighbours."""
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    spoil(moved, lambda offsets: to_neighbours(offsets["model.layers.0.mlp.up_proj"], np.arange(3), 1))
    planned = plan(moved)
    apply(planned, tmp_path / "tuned.gguf")
    certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
    assert certificate.weights.rounded_otherwise == 3
    apply(plan(run), tmp_path / "other.gguf")
    different = np.fromfile(tmp_path / "tuned.gguf", "<u2") != np.fromfile(tmp_path / "other.gguf", "<u2")
    assert np.count_nonzero(different) == 3


def test_without_held_out_rows_it_says_so(tiny: TinyLlama, tmp_path: Path) -> None:
    planned = plan(write_run(tmp_path / "run", tiny.path, held_out=False))
    apply(planned, tmp_path / "tuned.gguf")
    certificate = certify(planned, tmp_path / "tuned.gguf", "tuned.gguf")
    assert isinstance(certificate.held_out, NotMeasured)
    assert isinstance(certificate.llamacpp, InLlamaCpp)
    assert certificate.llamacpp.loads
    for missing in (certificate.held_out, certificate.llamacpp.answers):
        assert missing == NotMeasured("the run held no rows out: it has no heldout.jsonl")
    assert certificate.as_dict()["held_out"] == {"not_measured": "the run held no rows out: it has no heldout.jsonl"}


def test_without_llamacpp_it_says_how_to_get_it(planned: Plan, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # what Python itself takes for a package that is not there
    certificate = certify(planned, merged, "tuned.gguf")
    assert isinstance(certificate.llamacpp, NotMeasured)
    assert "pip install 'lorafit[llamacpp]'" in certificate.llamacpp.not_measured
    assert isinstance(certificate.held_out, HeldOut)


def test_what_llamacpp_cannot_load_is_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    shutil.copy(tiny.path, base)
    claim_to_be_a_part(base)
    planned = plan(write_run(tmp_path / "run", base, held_out=False))
    apply(planned, tmp_path / "temporary")
    with pytest.raises(MergeError, match=r"tuned\.gguf is not kept: .*base\.gguf: llama\.cpp cannot load it"):
        certify(planned, tmp_path / "temporary", "tuned.gguf")
