"""From a name, file or directory to a model that is ready to train, and its tokenizer.

transformers provides the architecture, built on the meta device so that no weight is ever allocated; then every linear
layer and embedding of a GGUF file becomes a view of the mapped blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.adapters import load_adapter, read_record
from lorafit.config import Compute
from lorafit.containers.gguf import GGUFFile, TensorInfo
from lorafit.containers.stamp import take_stamp
from lorafit.errors import ContainerError, MissingFileError, ModelError
from lorafit.formats import dequantize, finite
from lorafit.models import keymap
from lorafit.models.base import Base
from lorafit.models.directory import load_directory
from lorafit.models.problems import raise_problems
from lorafit.models.pull import EMBEDDED, pull
from lorafit.models.tokenizer import tokenizer_from_gguf
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight


def load(model: str | Path, *, compute: Compute = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, or a run with its adapter.

    Args:
        model: ``smollm2-135m``, a .gguf file, a Hugging Face directory, or the directory of a run.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        MissingFileError: Nothing is there, or the base of the run has gone.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
        AdapterError: The adapter does not fit its base.
    """
    adapter = Path(model) / "adapter"
    if not adapter.is_dir():
        base = load_base(model, compute=compute)
        return base.model, base.tokenizer
    base = load_base(read_record(adapter).base, compute=compute)
    load_adapter(base.model, adapter)
    return base.model, base.tokenizer


def load_base(model: str | Path, *, compute: Compute = "auto") -> Base:
    """Load a base model.

    Args:
        model: ``smollm2-135m``, a .gguf file, or a Hugging Face directory.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.

    Raises:
        MissingFileError: Nothing is there.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
    """
    path = _resolve(model)
    dtype = compute_dtype(compute)
    _settle_sines()
    if path.is_dir():
        return load_directory(path, dtype)
    stamp = take_stamp(path)
    file = GGUFFile.open(path)
    licence = str(file.metadata.get("general.license", "not stated"))
    keymap.family_of(file.metadata.get("general.architecture"), str(path))  # of an unknown one, read nothing else
    tokenizer = tokenizer_from_gguf(file)
    return Base(_model_from_gguf(file, tokenizer, dtype), tokenizer, path, dtype, stamp, licence)


def compute_dtype(compute: Compute) -> torch.dtype:
    """The arithmetic type that ``--compute`` names on this machine."""
    if compute == "auto":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]


def _settle_sines() -> None:
    """Use the sine and the cosine once, in one thread.

    MKL chooses how to compute them when they are first used. When several threads are first together, which for the
    rotary embedding they are, one of them may get a coarse version that is off by 1e-4: in about one process of a
    hundred, the first forward pass differs from all later ones.
    """
    torch.ones(1).sin()
    torch.ones(1).cos()


def _multiplies_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _resolve(model: str | Path) -> Path:
    if str(model) in EMBEDDED:
        return pull(str(model))
    path = Path(model)
    if not path.exists():
        names = ", ".join(EMBEDDED)
        raise MissingFileError(
            f"{model}: no such model; give a .gguf file, a directory of safetensors, a run, or one of: {names}"
        )
    return path


def _model_from_gguf(file: GGUFFile, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    where = str(file.path)
    family = keymap.family_of(file.metadata.get("general.architecture"), where)
    fields = keymap.config_fields(file.metadata, where)
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
        vocab_size=embedding.shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    _check_tensors(file, model)
    # Matrices first: a bias is put on the packed layer that its matrix brings.
    for info in sorted(file.tensors.values(), key=lambda info: len(info.shape), reverse=True):
        name = keymap.hf_name(info.name)
        if name is not None:
            _place(model, name, info, _blocks(file, info), keymap.row_order(info.name, family, config), dtype)
    if config.tie_word_embeddings:
        model.lm_head = PackedLinear(model.model.embed_tokens.packed)
    _restore_rotary(model, file)
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not on_meta, f"left without data: {on_meta}"
    return model.requires_grad_(False).eval()


def _blocks(file: GGUFFile, info: TensorInfo) -> Tensor:
    """The blocks of a tensor, which must hold finite numbers: what a damaged one does would be seen late or never."""
    blocks = file.blocks(info.name)
    if not finite(blocks, info.format):
        raise ContainerError(f"{file.path}: {info.name!r} holds numbers that are not finite; fetch the file again")
    return blocks


def _check_tensors(file: GGUFFile, model: PreTrainedModel) -> None:
    """Compare the file's tensors with the model's, and report every difference at once."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {keymap.hf_name(name) or name: info for name, info in file.tensors.items() if name != keymap.ROTARY_FACTORS}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, info in found.items():
        if name not in expected:
            problems.append(f"{info.name!r} is not a tensor of this architecture")
        elif expected[name] != info.shape:
            problems.append(f"{info.name} has the shape {list(info.shape)}, not {list(expected[name])}")
    raise_problems(file.path, problems)


def _place(
    model: PreTrainedModel, name: str, info: TensorInfo, blocks: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> None:
    """Put a tensor of the file where it belongs: matrices stay packed, vectors become parameters."""
    owner_name, kind = name.rsplit(".", 1)
    owner = model.get_submodule(owner_name)
    if len(info.shape) == 2:
        packed = PackedWeight(blocks, info.format, rows=rows, name=info.name)
        if isinstance(owner, nn.Embedding):
            model.set_submodule(owner_name, PackedEmbedding(packed, dtype, owner.padding_idx))
        else:
            model.set_submodule(owner_name, PackedLinear(packed))
        return
    vector = dequantize(blocks, info.format, info.shape)
    vector = vector if rows is None else vector[rows]
    setattr(owner, kind, nn.Parameter(vector.to(dtype), requires_grad=False))


def _restore_rotary(model: PreTrainedModel, file: GGUFFile) -> None:
    """Rotary frequencies are computed, not stored: build them anew off the meta device, with the file's factors."""
    rotary = type(model.model.rotary_emb)(model.config)
    if keymap.ROTARY_FACTORS in file.tensors:
        info = file.tensors[keymap.ROTARY_FACTORS]
        factors = dequantize(_blocks(file, info), info.format, info.shape)
        if factors.shape != rotary.inv_freq.shape or not bool((factors > 0).all()):
            wanted = len(rotary.inv_freq)
            raise ModelError(f"{file.path}: {info.name} must be {wanted} positive factors, one for each pair of a head")
        rotary.inv_freq = rotary.inv_freq / factors
        rotary.original_inv_freq = rotary.inv_freq.clone()
    model.model.rotary_emb = rotary
