"""Several adapters of one base as one adapter.

What adapters do adds up in their updates sᵢ·Bᵢ Aᵢ, so their weighted sum is Σ wᵢ sᵢ·Bᵢ Aᵢ, whatever the ranks and
scalings: ``linear`` and ``cat`` are this sum and ``svd`` is the closest to it of a given rank. (PEFT's ``linear`` sums
the factors instead, each times √(wᵢ sᵢ), and so adds the products √(wᵢ sᵢ wⱼ sⱼ)·Bᵢ Aⱼ of factors that never met in
training. That is ``magnitude_prune`` at density 1, which prunes nothing.)

The others are made for the case that updates stand in each other's way. Numbers are pruned, and the rest is summed:

- ``magnitude_prune`` keeps the largest of each adapter.
- TIES (arXiv 2306.01708) does so too; the sign of each number is elected by all adapters, and what agrees is averaged.
- DARE (arXiv 2311.03099) drops at random and divides the rest by the density, so that the mean stays. ``dare_ties``
  then elects and averages as TIES does.

The papers prune the update itself. With ``_svd`` that is what happens: each update of a layer is formed, one layer at
a time, and the closest of a given rank is what is left in the end. Without it the factors are pruned and summed, as in
PEFT, each times √(wᵢ sᵢ), the sign of the weight in A; ranks must be equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafit.adapters.foreign import read_targets
from lorafit.adapters.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterRecord,
    note_of,
    peft_fields,
    weights_file,
    write_importance,
    write_tensors,
)
from lorafit.adapters.updates import Adapter, Update, weighted_sum
from lorafit.config import Combination, LoRA
from lorafit.containers.atomic import fingerprint, write_text
from lorafit.errors import AdapterError, ConfigError

# Relative; the factors are float32.
_ROUNDING = torch.finfo(torch.float32).eps

Mix = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


@dataclass(frozen=True)
class Combined:
    """Several adapters as one.

    Attributes:
        adapters: What it was made from.
        weights: With these.
        recipe: And so.
        updates: As those of an adapter; all of one rank, scaling 1.
        rank: That rank.
        distance: How far that is from the weighted sum of the updates, relative to its norm.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    recipe: Combination
    updates: Mapping[str, Update]
    rank: int
    distance: float

    def provenance(self) -> dict[str, Any]:
        """How it was made: the method, and each adapter with its weight and the SHA-256 of its file."""
        made_from = [
            {"path": str(adapter.path.resolve()), "weight": weight, "sha256": fingerprint(weights_file(adapter.path))}
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
        ]
        settings = {name: value for name, value in asdict(self.recipe).items() if value is not None}
        return settings | {"rank": self.rank, "distance": self.distance, "of": made_from}


def combine(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Combination) -> Combined:
    """Combine adapters of one base; a layer that some of them leave alone is combined from the others.

    Args:
        adapters: One or more.
        weights: A factor for each.
        recipe: How.

    Raises:
        ConfigError: There is not one finite weight for each adapter.
        AdapterError: One is more than low-rank updates, or shapes differ, or ranks, which the method needs to be equal.
    """
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights are {list(weights)}, but must be {len(adapters)} numbers, one for each adapter")
    _check_fit(adapters)
    mix = None if recipe.method in ("linear", "cat", "svd") else _mixing(recipe)
    limit = recipe.rank or max(update.rank for adapter in adapters for update in adapter.updates.values())
    results, squares, off = {}, 0.0, 0.0
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.updates):
        having = [i for i, adapter in enumerate(adapters) if name in adapter.updates]
        updates, factors = [adapters[i].updates[name] for i in having], [weights[i] for i in having]
        exact = weighted_sum(updates, factors)
        # Relative to what is summed: where the terms cancel, what is left is rounding, however it compares to itself.
        rounding = _ROUNDING * sum(abs(weight) * update.norm() for update, weight in zip(updates, factors, strict=True))
        if recipe.method == "cat":
            results[name] = exact
        elif mix is None:
            results[name] = exact.closest(limit if recipe.method == "svd" else None, rounding)
        elif recipe.method.endswith("_svd"):
            results[name] = _closest(mix([update.dense() for update in updates], factors), limit)
        else:
            results[name] = _by_factors(name, updates, factors, mix)
        norm = exact.norm()
        if norm > rounding:
            squares += norm**2
            off += results[name].distance(exact) ** 2
    rank = max(update.rank for update in results.values())
    padded = {name: _padded(update, rank) for name, update in results.items()}
    return Combined(adapters, weights, recipe, padded, rank, math.sqrt(off / squares) if squares else 0.0)


def common_base(adapters: Sequence[Adapter]) -> AdapterRecord:
    """The record of the first adapter, after it was made sure that all were trained on the same base.

    Raises:
        AdapterError: They were not, or for lack of hashes it is not known.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if difference := base_difference(first.record, other.record):
            raise AdapterError(f"{first.path} and {other.path} were not trained on the same base: {difference}")
    return first.record


def base_difference(one: AdapterRecord, two: AdapterRecord) -> str | None:
    """In what two bases differ, in a few words; None if they are the same. Without hashes they go by their names."""
    if one.base_tensors_sha256 and two.base_tensors_sha256:
        identity = "SHA-256 of its tensors", one.base_tensors_sha256, two.base_tensors_sha256
    elif one.base_sha256 or two.base_sha256:
        identity = "SHA-256", one.base_sha256, two.base_sha256
    else:
        identity = "name", one.base, two.base
    for what, first, second in (
        identity,
        ("quantisation", one.quantize or "none", two.quantize or "none"),
        ("weighing of the quantisation", _digest(one.importance), _digest(two.importance)),
    ):
        if first != second:
            return f"{what} is {first or 'not known'} and {second or 'not known'}"
    return None


def save_combined(combined: Combined, directory: Path, record: AdapterRecord) -> None:
    """Write a combination as an adapter, with what it was made from in the header of its weights.

    Args:
        combined: What ``combine`` gave.
        directory: Where to write; must exist.
        record: What says the base.

    Raises:
        AdapterError: What is on disk is not what was made.
    """
    targets = _targets(combined)
    # The factor alpha/rank is 1, in which all tools agree.
    config = LoRA(rank=combined.rank, alpha=float(combined.rank), targets=read_targets(targets))
    record = replace(record, config=config)
    weights = {}
    for place, update in combined.updates.items():
        a, b = update.a, update.b
        if a.dim() == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        weights[f"base_model.model.{place}.lora_A.weight"] = a.contiguous()
        weights[f"base_model.model.{place}.lora_B.weight"] = b.contiguous()
    header = note_of(record) | {"combined": combined.provenance()}
    write_tensors(directory / WEIGHTS_FILE, weights, {"format": "pt", "lorafit": json.dumps(header)})
    if record.importance:
        write_importance(directory, record.importance)
    write_text(directory / CONFIG_FILE, json.dumps(peft_fields(record, targets), indent=2) + "\n")


def _mixing(recipe: Combination) -> Mix:
    """Pruning and summing, of updates or of factors."""
    kind, density = recipe.method.removesuffix("_svd"), recipe.density
    assert density is not None, "checked by Combination"
    generator = torch.Generator().manual_seed(recipe.seed or 0)

    def mix(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        pruned = [
            _drop(each, density, generator) if kind.startswith("dare") else _trim(each, density) for each in tensors
        ]
        stacked = torch.stack(pruned)
        weighted = stacked * torch.tensor(weights).view(-1, *[1] * tensors[0].dim())
        if not kind.endswith("ties"):
            return weighted.sum(0)
        signs = stacked.sign()
        votes = signs if recipe.majority == "frequency" else stacked
        agrees = signs == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    return mix


def _trim(tensor: Tensor, density: float) -> Tensor:
    """Only the largest numbers, that share of all."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(tensor.shape)


def _drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number with that probability, divided by it."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _by_factors(name: str, updates: Sequence[Update], weights: Sequence[float], mix: Mix) -> Update:
    ranks = {update.rank for update in updates}
    if len(ranks) > 1:
        raise AdapterError(
            f"{name} has the ranks {', '.join(map(str, sorted(ranks)))}, but factors can only be combined if their "
            "ranks are equal; take linear, cat, or a method that ends in svd"
        )
    factors = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    a = mix(
        [update.a.float() for update in updates], [math.copysign(r, f) for r, f in zip(roots, factors, strict=True)]
    )
    return Update(a, mix([update.b.float() for update in updates], roots), 1.0)


def _closest(matrix: Tensor, rank: int) -> Update:
    """The closest update of a rank to a matrix [..., out_dim, in_dim]."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    root = values[..., :rank].sqrt()
    return Update(root.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root.unsqueeze(-2), 1.0)


def _padded(update: Update, rank: int) -> Update:
    """The same update with factors in float32 of a larger rank, filled up by zeros."""
    more = rank - update.rank
    return Update(pad(update.a.float(), (0, 0, 0, more)), pad(update.b.float(), (0, more)), update.scale)


def _check_fit(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if adapter.others:
            rest = f" and {len(adapter.others) - 1} more" if len(adapter.others) > 1 else ""
            raise AdapterError(
                f"{adapter.path} is more than low-rank updates (it holds {adapter.others[0]}{rest}), and only "
                "those can be combined; merge it into its base"
            )
    stacks = {tuple(sorted(adapter.fields.get("target_parameters") or [])) for adapter in adapters}
    if len(stacks) > 1:
        raise AdapterError(
            f"{adapters[0].path} and others adapt different stacks of experts, which PEFT tells apart by their order "
            "alone; combine adapters of the same ones"
        )
    for adapter in adapters[1:]:
        for other in adapters:
            for name in adapter.updates.keys() & other.updates.keys():
                one, two = adapter.updates[name].shape, other.updates[name].shape
                if one != two:
                    raise AdapterError(
                        f"{name} is {list(one)} in {adapter.path} and {list(two)} in {other.path}; they are adapters "
                        "of different models"
                    )


def _targets(combined: Combined) -> dict[str, Any]:
    """What is adapted, in PEFT's configuration: what any of the adapters names, or if one does more than that, all."""
    fields = [adapter.fields for adapter in combined.adapters]
    named = [each.get("target_modules") or [] for each in fields]
    stacks = fields[0].get("target_parameters") or []
    narrowed = any(each.get(name) for each in fields for name in ("exclude_modules", "layers_to_transform"))
    if narrowed or any(isinstance(names, str) for names in named):
        modules = [name for name, update in combined.updates.items() if update.a.dim() == 2]
    else:
        modules = sorted(set().union(*named))
    return {"target_modules": modules} | ({"target_parameters": stacks} if stacks else {})


def _digest(importance: Mapping[str, Tensor] | None) -> str:
    if importance is None:
        return "none"
    digest = hashlib.sha256()
    for name, values in sorted(importance.items()):
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
