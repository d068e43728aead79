"""Loading a checkpoint tensor by tensor into a model that takes no memory before.

At any time there are the tensors that are loaded already, and one more as it lies in its file (`SafetensorsDirectory`
gives its pages back). Linear layers become packed where they are quantised on the way or were quantised before; the
rest is put in the compute dtype.
"""

from __future__ import annotations

import re

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
from lorafit.modules import PackedLinear, PackedWeight


def fill_model(
    model: PreTrainedModel,
    files: SafetensorsDirectory,
    dtype: torch.dtype,
    how: Quantize | None,
    importance: Importance | None = None,
) -> dict[str, str]:
    """Load a checkpoint whose linear layers are quantised: on the way, or by bitsandbytes before.

    Args:
        model: The architecture, from `lorafit.models.skeleton`.
        files: The checkpoint.
        dtype: Type of what is not quantised.
        how: What to quantise to; None for a checkpoint that bitsandbytes quantised.
        importance: See ``quantized``.

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
    kept = {}
    for name, shape in expected.items():
        layer = name.removesuffix(".weight")
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
        if isinstance(values, PackedWeight):
            model.set_submodule(layer, PackedLinear(values))
        else:
            put_parameter(model, name, values.to(dtype, copy=True))
    join_experts(model)
    model.tie_weights()
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not on_meta, f"left without data: {on_meta}"
    return {joined_name(name): why for name, why in kept.items()}


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
