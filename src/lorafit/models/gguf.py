"""A GGUF file as a model: transformers' modules over the mapped blocks.

transformers provides the architecture, built on the meta device so that no weight is ever allocated; then every linear
layer and embedding becomes a view of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.containers.gguf import GGUFFile, TensorInfo
from lorafit.containers.mapped import release
from lorafit.errors import ContainerError, ModelError
from lorafit.formats import dequantize, finite
from lorafit.models import keymap, rotary
from lorafit.models.configuration import config_fields
from lorafit.models.families import Family
from lorafit.models.fuse import fuse
from lorafit.models.longrope import settle_rotary
from lorafit.models.problems import raise_problems
from lorafit.modules import Experts, PackedEmbedding, PackedExperts, PackedLinear, PackedWeight
from lorafit.modules.experts import is_fused


def model_from_gguf(file: GGUFFile, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a file describes.

    Args:
        file: The open file.
        tokenizer: Its tokenizer.
        dtype: Arithmetic type.

    Returns:
        A model in evaluation mode, frozen, its matrices packed.

    Raises:
        ContainerError: A tensor holds numbers that are not finite.
        ModelError: The architecture, a setting or a tensor is not one that lorafit can use.
    """
    where = str(file.path)
    family = keymap.family_of_file(file.metadata, where)
    factors = _rotary_factors(file, family)
    fields = config_fields(file.metadata, where, factors)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{where}: the tensor token_embd.weight is missing")
    if len(tokenizer) != embedding.shape[0]:
        raise ModelError(f"{where}: has {len(tokenizer)} tokens, but token_embd.weight is for {embedding.shape[0]}")
    if fields["num_hidden_layers"] > len(file.tensors):
        raise ModelError(f"{where}: claims {fields['num_hidden_layers']} layers, but holds {len(file.tensors)} tensors")
    config = AutoConfig.for_model(
        family.model_type,
        **fields,
        **{field: f"blk.0.{name}.bias" in file.tensors for field, name in family.biases.items()},
        vocab_size=embedding.shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _check_tensors(file, family, model)
    # Matrices first: a bias is put on the packed layer that its matrix brings.
    for info in sorted(file.tensors.values(), key=lambda info: len(info.shape), reverse=True):
        if info.name not in factors and len(info.shape) < 3:
            _place(model, family, info, _blocks(file, info), dtype)
    _place_experts(model, family, file)
    if config.tie_word_embeddings:
        model.lm_head = PackedLinear(model.model.embed_tokens.packed, dtype=dtype)
    settle_rotary(model, where)
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not on_meta, f"left without data: {on_meta}"
    return fuse(model.requires_grad_(False).eval())


def _rotary_factors(file: GGUFFile, family: Family) -> dict[str, Tensor]:
    names = [rotary.FACTORS] if family.rotary_factors else []
    if "longrope" in family.scalings:
        names += [rotary.LONG_FACTORS, rotary.SHORT_FACTORS]
    infos = [file.tensors[name] for name in names if name in file.tensors]
    return {info.name: dequantize(_blocks(file, info), info.format, info.shape) for info in infos}


def _blocks(file: GGUFFile, info: TensorInfo) -> Tensor:
    """The blocks of a tensor, which must hold finite numbers: what a damaged one does would be seen late or never."""
    blocks = file.blocks(info.name)
    if not finite(blocks, info.format):
        raise ContainerError(f"{file.path}: {info.name!r} holds numbers that are not finite; fetch the file again")
    release(blocks)
    return blocks


def _check_tensors(file: GGUFFile, family: Family, model: PreTrainedModel) -> None:
    """Compare the file's tensors with the model's, and report every difference at once."""
    expected = _expected_shapes(model)
    used_elsewhere = _rotary_factors(file, family)
    found = {keymap.hf_name(name, family) or name: info for name, info in file.tensors.items()}
    found = {name: info for name, info in found.items() if info.name not in used_elsewhere}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, info in found.items():
        if name not in expected:
            problems.append(f"{info.name!r} is not a tensor of this architecture")
        elif expected[name] != info.shape:
            problems.append(f"{info.name} has the shape {list(info.shape)}, not {list(expected[name])}")
    raise_problems(file.path, problems)


def _expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The parameters of a model, with transformers' fused experts taken apart as they lie in the file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            count, width, in_dim = parameter.shape
            prefix = name.removesuffix("gate_up_proj")
            shapes |= {f"{prefix}{half}_proj.weight": (count, width // 2, in_dim) for half in ("gate", "up")}
        elif name.endswith("experts.down_proj"):
            shapes[f"{name}.weight"] = tuple(parameter.shape)
        else:
            shapes[name] = tuple(parameter.shape)
    return shapes


def _place(model: PreTrainedModel, family: Family, info: TensorInfo, blocks: Tensor, dtype: torch.dtype) -> None:
    """Put a tensor of the file where it belongs: the matrices of layers stay packed, the rest are parameters."""
    name = keymap.hf_name(info.name, family)
    assert name is not None, "checked by _check_tensors"
    rows = keymap.row_order(info.name, family, model.config)
    owner_name, kind = name.rsplit(".", 1)
    owner = model.get_submodule(owner_name)
    if kind == "weight" and isinstance(owner, nn.Linear):
        packed = PackedWeight(blocks, info.format, rows=rows, name=info.name)
        model.set_submodule(owner_name, PackedLinear(packed, dtype=dtype))
    elif isinstance(owner, nn.Embedding):
        scale = getattr(owner, "scalar_embed_scale", 1.0)  # Gemma's embedding has one
        packed = PackedWeight(blocks, info.format, rows=rows, name=info.name)
        model.set_submodule(owner_name, PackedEmbedding(packed, dtype, owner.padding_idx, scale))
    else:  # norms, biases and the routers of experts
        values = dequantize(blocks, info.format, info.shape) - keymap.norm_shift(info.name, family)
        values = values if rows is None else values[rows]
        setattr(owner, kind, nn.Parameter(values.to(dtype), requires_grad=False))


def _place_experts(model: PreTrainedModel, family: Family, file: GGUFFile) -> None:
    """Put packed experts where transformers' fused ones stand; the file keeps their three matrices apart."""
    for name, fused in [item for item in model.named_modules() if is_fused(item[1])]:
        roles = []
        for role in ("gate_proj", "up_proj", "down_proj"):
            info = file.tensors[keymap.gguf_name(f"{name}.{role}.weight", family) or ""]
            pieces = _blocks(file, info).chunk(info.shape[0])
            roles.append([PackedWeight(piece, info.format, name=info.name) for piece in pieces])
        gate_up = PackedExperts(list(zip(*roles[:2], strict=True)), sums=False)
        down = PackedExperts(list(zip(roles[2], strict=True)), sums=True)
        model.set_submodule(name, Experts(gate_up, down, fused.act_fn))
