"""Rotary embeddings of a loaded model: made anew off the meta device, and right for documents laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorafit.errors import ModelError


class LongRotary(nn.Module):
    """LongRoPE for documents laid end to end: each one's own length decides which of the two factors it gets.

    transformers decides once for a whole batch, so that a short document would be computed otherwise beside a long one
    than alone. (llama.cpp decides by the size of the context that it was started with.)
    """

    long: Tensor
    short: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.original = config.rope_parameters["original_max_position_embeddings"]
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, self.attention_scaling = compute(config)
        long, _ = compute(config, seq_len=self.original + 1)
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long", long, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [batch, tokens, rotated dimensions] each, of positions that start at 0 in a document."""
        document = (position_ids == 0).cumsum(-1)
        last = torch.zeros_like(document).scatter_reduce(-1, document - document[:, :1], position_ids, "amax")
        is_long = last.gather(-1, document - document[:, :1]) >= self.original
        angles = position_ids[..., None].float() * torch.where(is_long[..., None], self.long, self.short)
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)


def settle_rotary(model: PreTrainedModel, where: str) -> None:
    """Compute rotary frequencies anew, off the meta device, and so that each document gets its own.

    Raises:
        ModelError: The frequencies would depend on what the model was used for before.
    """
    kinds = {model.config.rope_parameters.get("rope_type")}
    if "dynamic" in kinds:
        raise ModelError(f"{where}: rotary scaling 'dynamic' is not supported: it depends on the longest text so far")
    rotary = LongRotary if kinds == {"longrope"} else type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config)


def long_from(model: PreTrainedModel) -> int | None:
    """From which length on all of a text is computed with other rotary frequencies; None for never."""
    rotary = model.model.rotary_emb
    return rotary.original + 1 if isinstance(rotary, LongRotary) and not rotary.long.equal(rotary.short) else None
