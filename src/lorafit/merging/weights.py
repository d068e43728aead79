"""The weights of a model with its adapter folded in, one tensor at a time.

A run computes with a frozen weight and an update beside it. Whatever kind its adapter is of, a layer says which weight
alone computes the same (``AdapterModule.merged_weight``). It is computed in float32, from the weight that was trained
beside, unpacked if it was packed, and rounded once to the type that is written.

With another weight in place of that one, the same update is added to it. For QA-LoRA without another weight there is
nothing to add: the blocks with the trained offsets, unpacked, are the trained weight to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.adapters import load_adapter
from lorafit.merging.exact import hold_stored
from lorafit.models.unpacked import Unpacked, expert_tensors, unpacked_tensors
from lorafit.modules import AdapterModule, LoRAExperts, QALoRALinear, adapter_modules
from lorafit.modules.experts import ExpertStack
from lorafit.modules.whole import TrainedCopy, TrainedTokens


def merged_tensors(
    model: PreTrainedModel, adapter: Path, onto: PreTrainedModel | None = None
) -> tuple[dict[str, Unpacked], dict[str, Unpacked]]:
    """Attach an adapter, and give the tensors of the merged model.

    Args:
        model: The base that it was trained on, loaded in float32.
        adapter: Directory of the adapter.
        onto: A model with the same layers whose weights the update is added to, if those are not the base's.

    Returns:
        Name in transformers' checkpoints -> tensor, of all that there are and of those that the adapter changes. A head
        that is tied to the embedding is there if one of the two was adapted for itself.

    Raises:
        MergeError: Offsets that QA-LoRA stored are not those of its adapter.
        LorafitError: The adapter does not fit the base.
    """
    source = onto or model
    tensors = unpacked_tensors(source)
    stacks = {name: part for name, part in source.named_modules() if isinstance(part, ExpertStack)}
    head, table = _name(model, model.get_output_embeddings()), _name(model, model.get_input_embeddings())
    load_adapter(model, adapter, hold_offsets=False)
    modules = adapter_modules(model)
    if offsets := {name: module for name, module in modules.items() if isinstance(module, QALoRALinear)}:
        hold_stored(adapter, offsets)
    if isinstance(adapted := modules.get(head), TrainedTokens) and adapted.tied:
        del modules[head]  # it reads the embedding's rows, and goes on to
    elif f"{head}.weight" not in tensors and (head in modules or table in modules):
        tensors[f"{head}.weight"] = tensors[f"{table}.weight"]
    changed: dict[str, Unpacked] = {}
    for name, module in modules.items():
        if isinstance(module, LoRAExperts):
            changed |= expert_tensors(name, stacks[name], _merged_experts(module, stacks[name]))
        elif isinstance(module, TrainedCopy):
            for part, values in module.copies.items():
                changed[f"{name}.{part}"] = Unpacked(tuple(values.shape), None, values.detach().to)
        else:
            base = tensors[f"{name}.weight"]
            changed[f"{name}.weight"] = Unpacked(base.shape, base.format, _merged(module, base, onto is None))
    return tensors | changed, changed


def _merged(module: AdapterModule, base: Unpacked, as_trained: bool) -> Callable[[torch.dtype], Tensor]:
    def values(dtype: torch.dtype) -> Tensor:
        if as_trained and isinstance(module, QALoRALinear):
            return module.trained.dense(dtype, module.merged_offsets())
        return module.merged_weight(base.values(torch.float32)).to(dtype)

    return values


def _merged_experts(module: LoRAExperts, stack: ExpertStack) -> Callable[[int, torch.dtype], Tensor]:
    return lambda expert, dtype: module.merged_expert(expert, stack.dense(expert, torch.float32)).to(dtype)


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
