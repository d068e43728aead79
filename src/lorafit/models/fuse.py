"""A model of transformers with the element-wise work of its layers fused.

Norms, gated products, attention and whole decoder layers are replaced, instance by instance, by objects of a subclass
that share all state of the original: parameters keep their names, and whatever the fused code does not serve (another
device or type, a padded batch, a cache, an adapter that is more than an update) goes to the code of transformers as
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.containers.mapped import mapped_files
from lorafit.kernels import step
from lorafit.modules import attention, fused, layer
from lorafit.modules.packed import chooses_type
from lorafit.modules.product import can_be_stacked
from lorafit.modules.shared import apply_all, is_watched, known_part, lay_together

# The activations that gated products have, by the name in a model's configuration.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}

# Decoder layers that are x + attention(norm(x)) and then x + mlp(norm(x)), and nothing else.
_PLAIN_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "SmolLM3DecoderLayer"}


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Replace what can be replaced, in place; the model computes what it did, up to rounding."""
    if not step.is_available():
        return model
    activation = getattr(model.config, "hidden_act", None) or getattr(model.config, "hidden_activation", None)
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            replaced = _as(module, _Norm)
        elif kind.endswith("MLP") and hasattr(module, "gate_proj") and activation in _ACTIVATIONS:
            replaced = _as(module, _GatedMLP)
            replaced.gate_activation = _ACTIVATIONS[activation]
        elif kind.endswith("Attention") and hasattr(module, "q_proj") and not _softcap(module):
            replaced = _as(module, _Attention)
        elif kind in _PLAIN_LAYERS:
            replaced = _as(module, PlainLayer)
        else:
            continue
        model.set_submodule(name, replaced)
    return model


def lay_weights_together(model: PreTrainedModel) -> None:
    """Spare a training loop the copies of dense weights that are multiplied as one."""
    files = mapped_files()
    for module in model.modules():
        if isinstance(module, _Attention | _GatedMLP):
            lay_together([module.get_submodule(name) for name in module.side_by_side], files)


def as_one(model: nn.Module) -> bool:
    """Whether the decoder layers of a model with adapters are computed as one, as far as the model itself tells."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return bool(layers) and all(isinstance(layer, PlainLayer) and layer.is_known() for layer in layers)


def _softcap(module: nn.Module) -> Any:
    return getattr(module, "attn_logit_softcapping", None)


def _as(module: nn.Module, mixin: type) -> Any:
    """The same module with other methods."""
    original: Any = type(module)
    replaced: Any = object.__new__(_subclass(original, mixin))
    replaced.__dict__ = module.__dict__
    return replaced


@cache
def _subclass(original: type, mixin: type) -> type:
    return type(original.__name__, (mixin, original), {})


class _Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        frozen = self.frozen(x)
        return super().forward(x) if frozen is None else fused.norm(x, frozen.factors, frozen.eps)

    def frozen(self, x: Tensor) -> layer.Norm | None:
        """The norm in numbers, if the fused code serves it on x."""
        weight: Any = self.weight
        if weight.requires_grad or weight.dtype != x.dtype or not step.serves(x, x.shape[-1]):
            return None
        factors = weight.float()
        if type(self).__name__.startswith("Gemma"):
            factors = factors + 1.0
        eps: Any = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return layer.Norm(factors, eps)


class _GatedMLP(nn.Module):
    gate_activation: str
    side_by_side = ("gate_proj", "up_proj")

    @chooses_type
    def forward(self, x: Tensor) -> Tensor:
        gate, up = apply_all([self.get_submodule(name) for name in self.side_by_side], x)
        if not step.serves(gate, gate.shape[-1]):
            return self.down_proj(self.act_fn(gate) * up)  # type: ignore[operator]
        return self.down_proj(fused.gated(gate, up, self.gate_activation))  # type: ignore[operator]


class _Attention(nn.Module):
    side_by_side = ("q_proj", "k_proj", "v_proj")

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *rest: Any, **named: Any) -> Any:
        how = self.within_documents(hidden_states, position_embeddings, named.get("document_lengths"))
        if how is None:
            return super().forward(hidden_states, position_embeddings, *rest, **named)
        layers = [self.get_submodule(name) for name in self.side_by_side]
        q, k, v = (each[0] for each in apply_all(layers, hidden_states))
        if hasattr(self, "q_norm"):
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        return self.o_proj(attention.attend(q, k, v, how).unsqueeze(0)), None  # type: ignore[operator]

    def within_documents(self, x: Tensor, angles: Any, lengths: Sequence[int] | None) -> attention.Attention | None:
        """How tokens attend, if that is within documents and the fused code serves it."""
        dim: Any = self.head_dim
        scale: Any = self.scaling
        angles = angles if getattr(self, "use_rope", True) else None
        half = dim // 2 if angles is None else angles[0].shape[-1] // 2
        if lengths is None or not step.serves(x, dim, half):
            return None
        if angles is not None:
            angles = tuple(each[0].to(x.dtype).contiguous() for each in angles)
        return attention.Attention(angles, step.side_by_side(tuple(lengths)), dim, scale, _window(self))


class PlainLayer(nn.Module):
    """A decoder layer that is computed as one where it can be.

    Attributes:
        keeps_less: Whether gate and up are computed again in the backward pass; of layers that are not computed as one,
            every second is computed again as a whole.
    """

    keeps_less = False

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        whole = self.whole(hidden_states, **named) if not rest else None
        if whole is not None:
            return layer.apply(hidden_states[0], whole).unsqueeze(0)
        attend: Any = self.self_attn
        if self.keeps_less and attend.layer_idx % 2 and torch.is_grad_enabled():
            return checkpoint(super().forward, hidden_states, *rest, use_reentrant=False, **named)
        return super().forward(hidden_states, *rest, **named)

    def linear_layers(self) -> list[nn.Module]:
        """Queries, keys, values, their output; gate, up, down."""
        names = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
        return [self.get_submodule(f"{module}.{name}") for module, each in names.items() for name in each]

    def pieces(self) -> tuple[Any, ...]:
        """What norms, attends and multiplies."""
        return self.input_layernorm, self.post_attention_layernorm, self.self_attn, self.mlp

    def has_known_pieces(self) -> bool:
        """Whether these are what the fused code knows, and nobody watches them."""
        pieces = self.pieces()
        known = all(map(isinstance, pieces, (_Norm, _Norm, _Attention, _GatedMLP)))
        return known and not any(map(is_watched, pieces)) and not hasattr(self.self_attn, "q_norm")

    def is_known(self) -> bool:
        """Whether all pieces and adapters are what the fused code knows, in training too."""
        layers = self.linear_layers()
        known = all(known_part(layer) and not getattr(layer, "dropout", 0.0) for layer in layers)
        return known and self.has_known_pieces()

    def whole(
        self, x: Tensor, position_embeddings: Any = None, document_lengths: Sequence[int] | None = None, **_: Any
    ) -> layer.Layer | None:
        """All that the layer does, if the fused code serves every part of it."""
        if torch.is_autocast_enabled(x.device.type) or not self.has_known_pieces():
            return None
        before, after, attend, gated = self.pieces()
        how = attend.within_documents(x, position_embeddings, document_lengths)
        norms = before.frozen(x), after.frozen(x)
        parts: list[Any] = [known_part(layer) for layer in self.linear_layers()]
        if how is None or None in norms or None in parts:
            return None
        q, k, v, o, gate, up, down = parts
        if not can_be_stacked((q, k, v)) or not can_be_stacked((gate, up)):
            return None
        return layer.Layer(norms, (q, k, v), o, (gate, up), down, how, gated.gate_activation, again=self.keeps_less)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """The norm of each head, or of all heads together: as wide as the norm is."""
    return norm(x.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)


def _window(module: Any) -> int | None:
    return (
        module.sliding_window if hasattr(module, "sliding_window") else getattr(module.config, "sliding_window", None)
    )
