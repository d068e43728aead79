"""How much of a pass is kept for the backward pass: as asked, or the most that fits into the memory that is free.

What a step needs follows from the model's dimensions. With w the width of the hidden states, q and k the widths of all
query and key heads and f that of the feed-forward part (of the experts of a token together), a layer that is computed
as one (``modules.layer``) keeps of a token

    2 w (inputs of the norms) + q + 2 k (attention) + 2 f (both factors of the gated product)

and with LoRA q more, what attention gave; ``low`` leaves out 2 f. A layer in pieces keeps another f, and with LoRA the
inputs of the adapters, 2 w + q + f; QA-LoRA keeps sums over blocks of them, which is next to nothing. A layer that is
computed again keeps its input, w. To this come one layer that is at work, with gradients as large as what it keeps in
pieces, the scores of one piece of attention, a chunk of logits, the largest unpacked weight, gradients and moments of
the adapter, and code. Pages of a mapped file go back once they were read. The sum is held by a test to a factor of 2.5
of the measured peak, and 60% of what is free is planned for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from transformers import PreTrainedModel

from lorafit.config import Memory, MemoryLevel
from lorafit.data.chat import Document
from lorafit.kernels import step
from lorafit.models.fuse import as_one
from lorafit.modules.packed import PIECE
from lorafit.objectives.sft import CHUNK
from lorafit.training.memory import Free

_PLANNED_SHARE = 0.6
_LEVELS: tuple[MemoryLevel, ...] = get_args(MemoryLevel)  # from the most memory to the least
_PIECE = 512  # queries at a time, or whole documents up to here, in attention
_SCORES = 12  # buffers of the largest piece's scores; the allocator keeps those of smaller pieces before it, too
_CODE = 30_000_000  # libraries and kernels that the first step loads and compiles
_OF_PARAMETER = 12  # gradient and two moments in float32


@dataclass(frozen=True)
class ChosenLevel:
    """What a step keeps, and why.

    Attributes:
        level: What it keeps.
        automatic: Whether lorafit chose it.
        tokens: Tokens in the longest pass of the run.
        step_bytes: Memory level -> the most that a step is estimated to need besides what is in memory before it.
        free_bytes: What was free; None where the system does not tell.
        reason: The same in words.
    """

    level: MemoryLevel
    automatic: bool
    tokens: int
    step_bytes: dict[MemoryLevel, int]
    free_bytes: int | None
    reason: str


def choose_level(asked: Memory, step_bytes: Mapping[MemoryLevel, int], tokens: int, free: Free) -> ChosenLevel:
    """The level that was asked for, or the first whose step fits; the last if none does.

    Args:
        asked: What the user said.
        step_bytes: What a step is estimated to need at each level.
        tokens: Tokens in the longest pass.
        free: What is free.
    """
    needs = dict(step_bytes)
    fitting = [each for each in _LEVELS if free.nbytes is None or needs[each] <= _PLANNED_SHARE * free.nbytes]
    level = asked if asked != "auto" else fitting[0] if fitting else _LEVELS[-1]
    need = f"a pass of {tokens:,} tokens is estimated to need {_gigabytes(needs[level])}"
    if free.nbytes is None:
        reason = f"{need}; {free.source}"
    else:
        reason = f"{need}, and {_gigabytes(free.nbytes)} are free{f' {free.source}' if free.source else ''}"
    if asked != "auto":
        reason = f"as asked; {reason}"
    elif not fitting:
        reason += "; that is little, and a smaller --pass-tokens and shorter rows need less"
    elif level != "high":
        reason += f"; high would need {_gigabytes(needs['high'])}"
    return ChosenLevel(level, asked == "auto", tokens, needs, free.nbytes, reason)


def estimate_step(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    itemsize: int,
    keeps_inputs: bool,
    keeps_outputs: bool = False,
) -> dict[MemoryLevel, int]:
    """Bytes that a step needs at its peak, at each memory level, besides what is in memory before it.

    Args:
        model: The model with its adapter.
        documents: Those of the longest pass.
        itemsize: Bytes of a number in the compute type.
        keeps_inputs: Whether adapters keep their inputs, as LoRA's do.
        keeps_outputs: Whether adapters keep what their layers give, as DoRA's do.
    """
    config: Any = model.config
    lengths = [len(document.tokens) for document in documents]
    tokens, width, layers = sum(lengths), config.hidden_size, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
    forward = config.intermediate_size
    if getattr(config, "num_experts_per_tok", None):
        forward = config.moe_intermediate_size * config.num_experts_per_tok
    layer = 2 * width + query + 2 * key + 3 * forward + (2 * width + query + forward if keeps_inputs else 0)
    layer += 2 * width + query + 2 * key + 2 * forward if keeps_outputs else 0
    kept = {
        "high": layers * layer,
        "low": layers // 2 * width + (layers - layers // 2) * layer,
        "lowest": layers * width,
    }
    if as_one(model):
        least = 2 * width + query + 2 * key + (query if keeps_inputs else 0)
        kept |= {"high": layers * (least + 2 * forward), "low": layers * least}
    scores = _SCORES * config.num_attention_heads * max(min(length, _PIECE) * length for length in lengths)
    logits = min(sum(sum(document.trained) for document in documents), CHUNK) * config.vocab_size
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    largest = max(min(config.vocab_size * width, PIECE), width * forward)
    common = itemsize * (2 * layer * tokens + scores + logits + largest)
    # Without a pass that leaves the gradient in their place, it is another of these, and two more in float32.
    common += (0 if step.is_available() else itemsize + 8) * logits + _OF_PARAMETER * trained + _CODE
    return {level: common + itemsize * tokens * kept[level] for level in _LEVELS}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
