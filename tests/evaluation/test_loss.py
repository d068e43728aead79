"""Figures on held-out rows against transformers' own loss, document by document."""

import math
from pathlib import Path

import pytest
import torch

from lorafit.config import LoRA, QALoRA
from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.evaluation.loss import evaluate
from lorafit.models.load import load_base
from lorafit.modules import attach
from tests.oracles.adapted import documents, fill
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

# Every token three times, which a model whose head is its embedding expects now and then.
DOCUMENTS = [
    Document([t for t in d.tokens for _ in range(3)], [f for f in d.trained for _ in range(3)], d.source)
    for d in documents([20, 1, 30, 66, 3, 40])
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128)


def test_figures_are_those_of_transformers(tiny: TinyLlama) -> None:
    dense = tiny.dense()
    total, hits, count = 0.0, 0, 0
    for document in DOCUMENTS:
        tokens = torch.tensor([document.tokens])
        labels = torch.where(torch.tensor([document.trained]), tokens, -100)
        with torch.no_grad():
            output = dense(tokens, labels=labels)
        here = int((labels[:, 1:] != -100).sum())
        total += float(output.loss) * here
        hits += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
        count += here
    model = load_base(tiny.path, compute="fp32").model
    for pass_tokens in (1, 150, 10_000):
        metrics = evaluate(model, split_passes(DOCUMENTS, pass_tokens))
        assert metrics.tokens == count
        # float32 through two layers in another order: measured 1e-7.
        assert metrics.loss == pytest.approx(total / count, abs=1e-5)
        assert metrics.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert metrics.token_accuracy == hits / count
    assert hits > 0
    assert metrics.as_dict() == {
        "loss": metrics.loss, "perplexity": metrics.perplexity, "token_accuracy": hits / count, "tokens": count,
    }  # fmt: skip


def test_the_state_of_the_model_is_neither_used_nor_changed(tiny: TinyLlama) -> None:
    model = load_base(tiny.path, compute="fp32").model
    attach(model, LoRA(rank=4, dropout=0.5))
    fill(model)
    batches = split_passes(DOCUMENTS, 300)
    before = model.config._attn_implementation
    model.train()
    training = evaluate(model, batches)
    assert model.training
    assert model.lm_head.training
    model.eval()
    assert evaluate(model, batches) == training  # no dropout in either
    assert not model.training
    assert model.config._attn_implementation == before


def test_each_evaluation_sees_the_adapter_as_it_is_then(tiny: TinyLlama) -> None:
    model = load_base(tiny.path, compute="fp32").model
    base = evaluate(model, batches := split_passes(DOCUMENTS, 300))
    attach(model, QALoRA(rank=4))
    assert evaluate(model, batches) == base
    fill(model)
    tuned = evaluate(model, batches)
    assert tuned.loss != base.loss
    assert evaluate(model, batches) == tuned


def test_nothing_to_score_is_no_success(tiny: TinyLlama) -> None:
    with pytest.raises(AssertionError):
        evaluate(load_base(Path(tiny.path), compute="fp32").model, [])
