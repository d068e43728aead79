"""Loading a checkpoint tensor by tensor into a model that takes no memory before.

At any time there are the tensors that are loaded already, and one more as it lies in its file (`SafetensorsDirectory`
gives its pages back). Linear layers become packed where they are quantised on the way or were quantised before; the
rest is put in the compute dtype, or, if that is wanted, matrices stay mapped in their files: then the model takes next
to no memory, and its numbers are the files' own.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.config import Quantize
from lorafit.containers.safetensors import SafetensorsDirectory
from lorafit.models.bitsandbytes import BitsAndBytes
from lorafit.models.problems import raise_problems
from lorafit.models.quantizing import Importance, quantized, why_kept
from lorafit.models.separate import join_experts, joined_name, separate_experts
from lorafit.models.skeleton import put_parameter
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight


def fill_model(
    model: PreTrainedModel,
    files: SafetensorsDirectory,
    dtype: torch.dtype,
    how: Quantize | None,
    importance: Importance | None = None,
    *,
    mapped: bool = False,
) -> dict[str, str]:
    """Load a checkpoint tensor by tensor.

    Args:
        model: The architecture, from `lorafit.models.skeleton`.
        files: The checkpoint.
        dtype: Type of what is not quantised.
        how: What to quantise linear layers to; None for a checkpoint that bitsandbytes quantised, or for one that is to
            stay as it is.
        importance: See ``quantized``.
        mapped: Leave matrices that are not quantised in their files.

    Returns:
        Linear layers that could not be packed -> why.

    Raises:
        ContainerError: A file is broken.
        ModelError: The checkpoint is not of this model, or holds what cannot be quantised.
    """
    separate_experts(model)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    before = BitsAndBytes(files.path, files.shapes.keys(), files.read)
    _check_names(files, model, expected, before)
    head = model.get_output_embeddings()
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    embedding = next(name for name, layer in model.named_modules() if layer is model.get_input_embeddings())
    kept = {}
    for name, shape in expected.items():
        layer = name.removesuffix(".weight")
        values: Tensor | PackedWeight
        if before.holds(name):
            values = before.load(name, shape)
            if isinstance(values, Tensor):
                kept[layer] = "bitsandbytes' layout of it fits no block format"
        elif how is None or name not in linear or model.get_submodule(layer) is head:
            values = files.read(name)
        elif why := why_kept(shape[1], how):
            values = files.read(name)
            kept[layer] = why
        else:
            values = quantized(files.read(name), how, name, files.path, importance)
        if mapped and isinstance(values, Tensor) and (name in linear or layer == embedding):
            values = _in_its_file(files, name) or values
        if isinstance(values, Tensor):
            put_parameter(model, name, values.to(dtype, copy=True))
        elif layer == embedding:
            owner: Any = model.get_submodule(layer)
            scale = getattr(owner, "scalar_embed_scale", 1.0)  # Gemma's embedding has one
            model.set_submodule(layer, PackedEmbedding(values, dtype, owner.padding_idx, scale))
        else:
            model.set_submodule(layer, PackedLinear(values))
    join_experts(model)
    table = model.get_input_embeddings()
    if isinstance(table, PackedEmbedding) and model.config.tie_word_embeddings:
        model.set_output_embeddings(PackedLinear(table.packed))
    else:
        model.tie_weights()
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not on_meta, f"left without data: {on_meta}"
    return {joined_name(name): why for name, why in kept.items()}


def _in_its_file(files: SafetensorsDirectory, name: str) -> PackedWeight | None:
    found = files.blocks(name)
    return None if found is None else PackedWeight(found[0], found[1], name=name)


def _check_names(
    files: SafetensorsDirectory, model: PreTrainedModel, expected: dict[str, tuple[int, ...]], before: BitsAndBytes
) -> None:
    """Compare the checkpoint's tensors with the model's, and report every difference at once."""
    known = {*expected, *(key for name in expected for key in before.companions(name))}
    # transformers computes rotary frequencies, and old checkpoints store them.
    ignored = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
    tied = model.all_tied_weights_keys
    problems = [f"{name} is missing" for name in expected if name not in files.shapes]
    for name, shape in files.shapes.items():
        if name in tied and tied[name] in files.shapes:
            if not torch.equal(files.read(name), files.read(tied[name])):
                problems.append(f"{name} differs from {tied[name]}, which config.json says is the same")
        elif name not in known:
            if not any(re.search(pattern, name) for pattern in ignored):
                problems.append(f"{name} is not a weight of this architecture")
        elif name in expected and expected[name] != shape and not before.holds(name):
            problems.append(f"{name} has the shape {list(shape)}, not {list(expected[name])}")
    raise_problems(files.path, sorted(problems))
