"""Quantising a full-precision base while it is loaded.

QLoRA's rule is kept for every format: the linear layers are quantised, and embeddings, the output head, norms and
biases stay as they are. The same weights give the same bits every time, so a run needs only the name of what was done
to find its base again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.config import Quantize
from lorafit.errors import FormatError, ModelError
from lorafit.formats import block_format
from lorafit.kernels import search
from lorafit.modules import PackedExperts, PackedLinear, PackedWeight

Importance = Mapping[str, Tensor]  # layer -> how strongly each of its inputs is used, [in_dim]

# What the names mean in blocks. QLoRA's own are doubly quantised.
BLOCK_FORMATS: dict[Quantize, str] = {
    "nf4": "NF4_DQ",
    "fp4": "FP4_DQ",
    "q4_1": "Q4_1",
    "q5_1": "Q5_1",
    "q8_0": "Q8_0",
}

SEARCHED = ("q4_1", "q5_1")  # those whose errors importance can weigh


def why_kept(width: int, how: Quantize) -> str | None:
    """Why a matrix with rows of ``width`` weights cannot be quantised so; None if it can."""
    block = block_format(BLOCK_FORMATS[how])
    if width % block.elements:
        return f"its rows of {width} weights are not whole blocks of {block.elements}"
    return None


def quantized(
    weights: Tensor, how: Quantize, name: str, where: object, importance: Importance | None = None
) -> PackedWeight:
    """A matrix in blocks.

    Args:
        weights: [out_dim, in_dim], any floating-point type; a row is a whole number of blocks.
        how: To what.
        name: The tensor's name.
        where: The file or directory that it comes from.
        importance: What the search of q4_1 and q5_1 weighs errors by; none weighs all inputs alike.

    Raises:
        ModelError: Some weights are not finite, or too large for the format; or the importance is not the layer's.
    """
    try:
        of_inputs = None if importance is None else importance.get(name.removesuffix(".weight"))
        packed = search.quantize(weights, BLOCK_FORMATS[how], of_inputs)
    except FormatError as error:
        raise ModelError(f"{where}: {name}: {error}") from None
    return PackedWeight(packed.blocks, BLOCK_FORMATS[how], constants=packed.constants, name=name)


def quantize_model(
    model: PreTrainedModel, how: Quantize, where: object, importance: Importance | None = None
) -> dict[str, str]:
    """Quantise the linear layers of a model in place, one after the other.

    Args:
        model: A model whose layers hold the numbers of a full-precision GGUF file.
        how: To what.
        where: The file, for errors.
        importance: See ``quantized``.

    Returns:
        Layers that were left as they are -> why.

    Raises:
        ModelError: Some weights are not finite, or too large for the format.
    """
    kept = {}
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLinear | PackedExperts) or layer is head:
            continue
        why = why_kept(layer.in_features, how)
        if why:
            kept[name] = why
        elif isinstance(layer, PackedLinear):
            layer.packed = quantized(layer.packed.dense(torch.float32), how, f"{name}.weight", where, importance)
        else:
            for i, part in enumerate(layer.parts):
                assert isinstance(part, PackedWeight)
                layer.parts[i] = quantized(part.dense(torch.float32), how, part.name, where)
    return kept
