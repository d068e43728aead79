"""A fused model computes what transformers computes, under the same names, in training and elsewhere."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from lorafit.config import LoRA
from lorafit.data.packing import pack
from lorafit.kernels import step
from lorafit.models.attention import document_attention
from lorafit.models.fuse import fuse
from lorafit.modules import attach
from lorafit.objectives.sft import sft_loss
from tests.oracles.adapted import documents, fill
from tests.oracles.family_gguf import KINDS, random_model

pytestmark = pytest.mark.skipif(not step.is_available(), reason="no vector code for this processor")


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with heads wide enough for vector code, and the same fused."""
    model = random_model(family, hidden_size=128, intermediate_size=160, head_dim=32, max_position_embeddings=512)
    return model, fuse(copy.deepcopy(model))


@pytest.mark.parametrize("family", KINDS)
def test_every_family_computes_what_it_did(family: str) -> None:
    plain, fused = pair(family)
    assert list(dict(fused.named_parameters())) == list(dict(plain.named_parameters()))
    attention = [type(each.model.layers[0].self_attn) for each in (plain, fused)]
    # Phi-3's projections are one, and Gemma 2 caps its scores: their attention stays as it is.
    assert (attention[0] is attention[1]) == (family in ("phi3", "gemma2"))
    assert type(plain.model.norm) is not type(fused.model.norm)
    batch = pack(documents([30, 61, 200, 5], vocab=plain.config.vocab_size))
    results = []
    for model in (plain, fused):
        model.requires_grad_(False)
        trained = [layer.weight.requires_grad_() for name, layer in model.named_modules() if name.endswith("_proj")]
        with document_attention(model):
            loss = sft_loss(model, batch)
            loss.backward()
        results.append((float(loss), [weight.grad for weight in trained]))
    # Float32 sums in another order, through a few layers.
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-6)
    for one, other in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,up_proj"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_adapters_get_the_gradients_that_they_had(family: str, targets: str) -> None:
    models = pair(family)
    batch = pack(documents([30, 61, 200, 5], vocab=models[0].config.vocab_size))
    grads = []
    for model in models:
        torch.manual_seed(0)
        attach(model, LoRA(rank=4, targets=targets))
        fill(model)
        with document_attention(model):
            sft_loss(model, batch).backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    # As above: float32 sums in another order.
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_padded_batches_and_caches_are_served_too(family: str) -> None:
    plain, fused = pair(family)
    ids = torch.randint(3, plain.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        found = fused(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)
        greedy = [model.generate(ids[1:], max_new_tokens=8, do_sample=False) for model in (plain, fused)]
    assert torch.equal(*greedy)


def test_norms_that_are_trained_keep_their_gradient() -> None:
    _, fused = pair("llama")
    ids = torch.arange(3, 40)[None]
    fused.requires_grad_(False)
    weight = fused.model.norm.weight.requires_grad_()
    fused(input_ids=ids, labels=ids).loss.backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero()
