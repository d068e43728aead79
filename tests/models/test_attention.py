"""Documents laid end to end: each is computed as if it were alone, and outside the context nothing has changed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lorafit.models.attention import attend_documents, document_attention
from tests.oracles.llama_gguf import VOCAB, random_llama

Forward = Callable[[LlamaForCausalLM, Tensor, Sequence[int]], Tensor]

# Short and long ones: up to 512 tokens go one way through the code, longer ones another.
LENGTHS = {"short": (1, 7, 30, 2), "long": (513, 600), "mixed": (5, 513, 512, 1, 40)}


def attention_by_hand(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """One document, one head and one token at a time, in float64: [tokens, heads, head_dim]."""
    query, key, value = (part.double() for part in (query, key, value))
    heads, tokens, _ = query.shape
    per_key_head = heads // key.shape[0]
    result = torch.empty(tokens, heads, query.shape[2], dtype=torch.float64)
    for head in range(heads):
        keys, values = key[head // per_key_head], value[head // per_key_head]
        for token in range(tokens):
            first = 0 if window is None else max(0, token - window + 1)
            scores = keys[first : token + 1] @ query[head, token] * scaling
            scores = scores if cap is None else cap * (scores / cap).tanh()
            likely = (scores - scores.max()).exp()
            result[token, head] = likely @ values[first : token + 1] / likely.sum()
    return result


def random_heads(heads: int, key_heads: int, tokens: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    # As a model hands them over: [1, heads, tokens, dim], of which tokens lie apart in memory.
    query, key, value = (
        torch.randn(1, tokens, count, dim, generator=generator).transpose(1, 2)
        for count in (heads, key_heads, key_heads)
    )
    return query, key, value


@pytest.mark.parametrize("lengths", [(1, 7, 30, 2), (520, 3)])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 515, 10**6])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_against_a_product_by_hand(
    lengths: tuple[int, ...], heads: int, key_heads: int, window: int | None, cap: float | None
) -> None:
    query, key, value = random_heads(heads, key_heads, sum(lengths))
    result, weights = attend_documents(
        torch.nn.Module(), query, key, value, None, scaling=0.3, document_lengths=lengths,
        sliding_window=window, softcap=cap,
    )  # fmt: skip
    assert weights is None
    assert result.shape == (1, sum(lengths), heads, 16)
    pieces = [part[0].split(lengths, dim=1) for part in (query, key, value)]
    expected = torch.cat([attention_by_hand(q, k, v, 0.3, window, cap) for q, k, v in zip(*pieces, strict=True)])
    # Means, weighted by a softmax in float32, of values that reach 5.
    torch.testing.assert_close(result[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (100, None), (None, 0.7), (100, 0.7)])
def test_gradients_of_long_documents(window: int | None, cap: float | None) -> None:
    """Of 1,100 tokens, which with a window or a cap go in three pieces, against a dense mask in float64."""
    lengths = (1100, 20)
    leaves = [part.requires_grad_() for part in random_heads(4, 2, sum(lengths))]
    weights = torch.randn(1, sum(lengths), 4, 16, generator=torch.Generator().manual_seed(1))
    options = {"document_lengths": lengths, "sliding_window": window, "softcap": cap}
    result, _ = attend_documents(torch.nn.Module(), *leaves, None, scaling=0.3, **options)
    found = torch.autograd.grad((result * weights).sum(), leaves)

    query, key, value = (part.detach().double().requires_grad_() for part in leaves)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = scores if cap is None else cap * (scores / cap).tanh()
    place = torch.arange(sum(lengths))
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or 10**6)) & ((place[:, None] < 1100) == (place < 1100))
    dense = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)
    expected = torch.autograd.grad((dense.transpose(1, 2) * weights).sum(), [query, key, value])
    for gradient, exact in zip(found, expected, strict=True):
        assert relative_error(gradient, exact) < 5e-6  # float32 sums of a thousand terms


def tokens_of(lengths: Sequence[int]) -> Tensor:
    return torch.randint(VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))


def positions_of(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packed_forward(model: LlamaForCausalLM, embedded: Tensor, lengths: Sequence[int]) -> Tensor:
    """Hidden states of all documents in one pass: [1, T, dim]."""
    with document_attention(model):
        return model.model(
            inputs_embeds=embedded, position_ids=positions_of(lengths), use_cache=False, document_lengths=lengths
        ).last_hidden_state


def alone_forward(model: LlamaForCausalLM, embedded: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same, each document in a pass of its own, through transformers' own attention."""
    parts = [model.model(inputs_embeds=part, use_cache=False).last_hidden_state for part in embedded.split(lengths, 1)]
    return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama(hidden_size=32, intermediate_size=48, max_position_embeddings=1024, attn_implementation="sdpa")


def outputs_and_gradients(
    model: LlamaForCausalLM, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    embedded = model.model.embed_tokens(tokens_of(lengths)).detach().to(dtype).requires_grad_()
    hidden = forward(model, embedded, lengths)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.zero_grad()
    (hidden * weights).sum().backward()
    assert embedded.grad is not None
    found = {"hidden states": hidden.detach(), "gradient of the input": embedded.grad}
    for name, parameter in model.model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    assert len(found) == 2 + 2 * 9 + 1, "every layer's weights and norms, and the last norm"
    return found


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_each_document_is_computed_as_if_it_were_alone(model: LlamaForCausalLM, lengths: tuple[int, ...]) -> None:
    together = outputs_and_gradients(model, packed_forward, lengths, torch.float32)
    alone = outputs_and_gradients(model, alone_forward, lengths, torch.float32)
    for name, expected in alone.items():
        # The order of float32 additions differs, nothing else: 2⁻²⁴ of each, over two layers and back.
        assert relative_error(together[name], expected) < 5e-6, name


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_bf16_is_as_near_to_float32_as_transformers_own(lengths: tuple[int, ...]) -> None:
    """bfloat16 keeps 8 bits, so two right results differ by percents; both must err alike against float32."""
    options = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 1024}
    exact = outputs_and_gradients(
        random_llama(**options, attn_implementation="sdpa"), alone_forward, lengths, torch.float32
    )
    half = random_llama(**options, attn_implementation="sdpa").to(torch.bfloat16)
    half.model.rotary_emb = random_llama(**options).model.rotary_emb
    together = outputs_and_gradients(half, packed_forward, lengths, torch.bfloat16)
    alone = outputs_and_gradients(half, alone_forward, lengths, torch.bfloat16)
    for name, expected in exact.items():
        usual = relative_error(alone[name], expected)
        assert usual < 0.1, name
        assert relative_error(together[name], expected) < 1.5 * usual, name


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7, 30, 5), (20, 600, 9)])
def test_documents_do_not_see_one_another(model: LlamaForCausalLM, lengths: tuple[int, ...]) -> None:
    embedded = model.model.embed_tokens(tokens_of(lengths))
    other = embedded.clone()
    start, end = lengths[0], lengths[0] + lengths[1]
    other[:, start:end] = torch.randn(1, lengths[1], 32)
    before, after = packed_forward(model, embedded, lengths), packed_forward(model, other, lengths)
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert (before[:, start:end] != after[:, start:end]).any(-1).all()
    # And within a document, nothing that comes later.
    last = embedded.clone()
    last[:, end - 1] = 0.0
    changed = (packed_forward(model, last, lengths) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [end - 1]


@torch.no_grad()
def test_outside_the_context_a_model_is_what_it_was(model: LlamaForCausalLM) -> None:
    tokens, mask = tokens_of((12,)).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    logits = model(input_ids=tokens, attention_mask=mask).logits
    generated = model.generate(tokens, attention_mask=mask, **options)
    packed_forward(model, model.model.embed_tokens(tokens_of((3, 4))), (3, 4))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, logits)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options), generated)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_a_model_is_what_it_was(implementation: str, error: type[BaseException]) -> None:
    model = random_llama(attn_implementation=implementation)

    def broken_off() -> None:
        with document_attention(model):
            assert model.config._attn_implementation != implementation
            raise error

    with pytest.raises(error):
        broken_off()
    assert model.config._attn_implementation == implementation


def test_contexts_can_be_nested(model: LlamaForCausalLM) -> None:
    lengths = (3, 4)
    embedded = model.model.embed_tokens(tokens_of(lengths)).detach()
    with document_attention(model):
        inside = packed_forward(model, embedded, lengths)
        again = model.model(
            inputs_embeds=embedded, position_ids=positions_of(lengths), use_cache=False, document_lengths=lengths
        ).last_hidden_state
    assert torch.equal(inside, again)
    assert model.config._attn_implementation == "sdpa"


def test_two_models_do_not_disturb_each_other(model: LlamaForCausalLM) -> None:
    other = random_llama(hidden_size=32, intermediate_size=48, max_position_embeddings=1024)
    embedded = model.model.embed_tokens(tokens_of((4,))).detach()
    with torch.no_grad(), document_attention(model):
        outside = other.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    with torch.no_grad():
        assert torch.equal(outside, other.model(inputs_embeds=embedded, use_cache=False).last_hidden_state)


def test_lengths_that_do_not_add_up_are_refused(model: LlamaForCausalLM) -> None:
    embedded = model.model.embed_tokens(tokens_of((9,))).detach()
    with pytest.raises(AssertionError), document_attention(model):
        model.model(
            inputs_embeds=embedded, position_ids=torch.arange(9)[None], use_cache=False, document_lengths=(4, 4)
        )
    with pytest.raises(TypeError, match="document_lengths"), document_attention(model):
        model.model(inputs_embeds=embedded, use_cache=False)
