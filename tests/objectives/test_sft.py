"""The loss on labelled places, in chunks, against transformers' full logits and plain autograd."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorafit.config import AdapterConfig, LoRA, QALoRA
from lorafit.data.chat import Document
from lorafit.data.packing import pack
from lorafit.models.attention import document_attention
from lorafit.models.load import load_base
from lorafit.modules import attach
from lorafit.objectives.sft import score, sft_loss
from tests.oracles.adapted import documents, fill
from tests.oracles.family_gguf import KINDS, random_model
from tests.oracles.tiny_gguf import write_tiny_llama

# 1,300 tokens of which two thirds are targets: two chunks of the head.
DOCUMENTS = documents([400, 2, 90, 500, 1, 7, 300], share=0.67)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, vocab=400).path


def adapted(path: Path, config: AdapterConfig, compute: str = "fp32") -> PreTrainedModel:
    model = load_base(path, compute=compute).model  # type: ignore[arg-type]
    torch.manual_seed(0)
    attach(model, config)
    fill(model)
    return model


def full_losses(model: PreTrainedModel, document: Document) -> Tensor:
    """Every target's loss from the whole document's logits, the document alone."""
    tokens = torch.tensor([document.tokens])
    losses = F.cross_entropy(model(tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="none")
    return losses[torch.tensor(document.trained[1:], dtype=torch.bool)]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert all(grad is not None for grad in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=4),
        QALoRA(rank=4),
        LoRA(rank=4, targets="q_proj,lm_head"),  # the head has an adapter of its own
        LoRA(rank=4, targets="lm_head"),  # and nothing below it
    ],
)
def test_loss_and_gradients_equal_those_of_the_full_logits(path: Path, config: AdapterConfig) -> None:
    model = adapted(path, config)
    batch = pack(DOCUMENTS)
    assert len(batch.targets) > 512
    with document_attention(model):
        loss = sft_loss(model, batch)
    (loss / 3).backward()
    ours = gradients(model)

    expected = torch.stack([full_losses(model, document).sum() for document in DOCUMENTS]).sum()
    (expected / 3).backward()
    assert loss.dtype == torch.float32
    # float32 sums of 850 losses of size 6, in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, grad in gradients(model).items():
        # The same sums over 1,300 tokens through the whole model: measured 3e-6 of the largest entry.
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=3e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("family", KINDS)
def test_loss_and_gradients_of_every_family_are_those_of_transformers(family: str) -> None:
    """Of all parameters, through windows, caps and scales; each document alone on transformers' eager path."""
    model = random_model(family)
    rows = documents([530, 20, 1, 9], vocab=260)
    with document_attention(model):
        loss = sft_loss(model, pack(rows))
        losses, _ = score(model, pack(rows))
    loss.backward()
    ours = gradients(model)
    expected = torch.cat([full_losses(model, row) for row in rows])
    expected.sum().backward()
    # float32 in another order, of losses that reach 18.
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-6, atol=0)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=3e-5 * float(grad.abs().max()), msg=name)


def test_scores_equal_those_of_the_full_logits(path: Path) -> None:
    model = adapted(path, QALoRA(rank=4)).eval()
    with document_attention(model):
        losses, hits = score(model, pack(DOCUMENTS))
    with torch.no_grad():
        expected = torch.cat([full_losses(model, document) for document in DOCUMENTS])
        logits = [model(torch.tensor([d.tokens])).logits[0, :-1] for d in DOCUMENTS]
    best = [int(row.argmax()) == token for d, rows in zip(DOCUMENTS, logits, strict=True)
            for row, token, flag in zip(rows, d.tokens[1:], d.trained[1:], strict=True) if flag]  # fmt: skip
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)  # float32, sums in another order
    assert hits.tolist() == best
    assert 0 < sum(best) < len(best)
    assert not losses.requires_grad


def test_a_target_far_from_likely_has_a_finite_loss(path: Path) -> None:
    model = adapted(path, LoRA(rank=4, alpha=4e4, targets="lm_head"))  # logits of some thousands
    batch = pack(DOCUMENTS)
    with document_attention(model):
        loss = sft_loss(model, batch)
    expected = torch.stack([full_losses(model, document).sum() for document in DOCUMENTS]).sum()
    assert loss.item() / len(batch.targets) > 500  # e^-500 is 0 in float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_the_scale_of_a_pass_is_not_rounded_to_bfloat16(path: Path) -> None:
    model = adapted(path, LoRA(rank=4), "bf16")
    found = []
    scale = 345 / 256  # half-way between two numbers of bfloat16: rounding would move it by 0.3%
    for factor in (1.0, scale):
        with document_attention(model):
            (sft_loss(model, pack(DOCUMENTS)) * factor).backward()
        found.append(torch.cat([grad.flatten() for grad in gradients(model).values()]).double())
    ratio = float((found[1] @ found[0]) / (found[0] @ found[0]))
    # The scaled gradients are rounded one by one, which averages out over 130,000 of them.
    assert ratio == pytest.approx(scale, rel=1e-3)
