"""Every family: a tiny random model, in a file that gguf-py wrote, means the same to lorafit, transformers, llama.cpp.

Compared are log-probabilities of every next token. In F32, transformers and lorafit differ by the order of float32
additions, some 1e-5 of numbers that reach 18; llama.cpp's Gemma by up to 5e-4, from its table of GELU in half
precision. A window, cap, factor, norm or bias that is left out changes them by more than 0.1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.models.attention import document_attention
from lorafit.models.load import load_base
from lorafit.models.logits import finish_logits
from tests.oracles.family_gguf import KINDS, random_model, write_family
from tests.oracles.llamacpp import LlamaCppOracle

LENGTHS = (12, 1, 30, 3)  # longer and shorter than the window
IDS = torch.randint(3, 260, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of one document through a whole model: [T, vocabulary]."""
    return model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)


def each_alone(of_one: Callable[[Tensor], Tensor], lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([of_one(part) for part in IDS.split(lengths)])


@torch.no_grad()
def packed(model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The same for documents laid end to end, on the way that training takes: [T, vocabulary]."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    with document_attention(model):
        hidden = model.get_decoder()(
            input_ids=IDS[None], position_ids=positions[None], use_cache=False, document_lengths=lengths
        ).last_hidden_state[0]
    return finish_logits(model, model.get_output_embeddings()(hidden)).log_softmax(-1)


def cpp(path: Path) -> Callable[[Tensor], Tensor]:
    oracle = LlamaCppOracle(path)
    return lambda ids: torch.from_numpy(oracle.logits(ids.tolist())).log_softmax(-1)


def furthest(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max())


# Name of a test -> family, what its configuration has beyond the usual, what its file has.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in KINDS},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_transformers_and_llama_cpp(tmp_path: Path, variant: str) -> None:
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    model = load_base(path, compute="fp32").model
    whole = alone(dense, IDS)
    parts = each_alone(lambda ids: alone(dense, ids))
    assert furthest(whole, parts) > 0.1, "documents that see one another would go unnoticed"
    assert furthest(alone(model, IDS), whole) < 1e-4
    assert furthest(packed(model, (len(IDS),)), whole) < 1e-4
    assert furthest(packed(model), parts) < 1e-4
    assert furthest(cpp(path)(IDS), whole) < 1e-3
    assert furthest(each_alone(cpp(path)), parts) < 1e-3
