"""Adapters as updates of weights, read from their files without a model.

An update is s·B A with A [rank, in_dim] and B [out_dim, rank]; a stack of experts has one for each expert. A sum of
updates is an update too: the Bs side by side, the As below one another. Whatever is asked of updates is computed at the
size of their ranks, in float64, and no matrix [out_dim, in_dim] is formed:

    <s B A, t D C> = s·t·Σ (Bᵀ D) ∘ (A Cᵀ)
    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ        with B = Q_B R_B and Aᵀ = Q_A R_A

The matrix in the middle is as small as the rank and has the singular values of the update, hence its norm. A distance
is the norm of a difference that is formed before it is squared, so it loses no digits where two updates are alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters.peft import CONFIG_FILE, AdapterRecord, read_fields, read_record, read_weights
from lorafit.config import LoRA
from lorafit.errors import AdapterError

_KEY = re.compile(r"base_model\.model\.(?P<place>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class Update:
    """The update of one weight, s·B A, as its factors.

    Attributes:
        a: A [rank, in_dim], or [experts, rank, in_dim].
        b: B [out_dim, rank], or [experts, out_dim, rank].
        scale: The factor s.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def parameters(self) -> int:
        """Numbers in both factors."""
        return self.a.numel() + self.b.numel()

    def dense(self) -> Tensor:
        """The update as a matrix, float32 [..., out_dim, in_dim]."""
        return self.scale * (self.b.float() @ self.a.float())

    def singular_values(self) -> Tensor:
        """The ``rank`` largest, in descending order, float64 [..., rank]."""
        return torch.linalg.svdvals(self._core()[1])

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self._core()[1].norm())

    def inner(self, other: Update) -> float:
        """Sum of the products of corresponding numbers of two updates of one weight."""
        b = self.b.double().mT @ other.b.double()
        a = self.a.double() @ other.a.double().mT
        return self.scale * other.scale * float((b * a).sum())

    def distance(self, other: Update) -> float:
        """Frobenius norm of the difference of two updates of one weight."""
        return weighted_sum((self, other), (1.0, -1.0)).norm()

    def closest(self, rank: int | None = None, least: float = 0.0) -> Update:
        """The closest update of a smaller rank (Eckart and Young 1936).

        Args:
            rank: Its rank; without one it takes as many as there are singular values above ``least``.
            least: What is not worth a rank.
        """
        q_b, core, q_a = self._core()
        u, values, v = torch.linalg.svd(core)
        if rank is None:
            rank = max(int((values > least).sum(-1).amax()), 1)
        root = values[..., :rank].sqrt()
        b = q_b @ (u[..., :rank] * root.unsqueeze(-2))
        a = (root.unsqueeze(-1) * v[..., :rank, :]) @ q_a.mT
        return Update(a.float(), b.float(), 1.0)

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_B, s·R_B R_Aᵀ and Q_A."""
        q_b, r_b = torch.linalg.qr(self.b.double())
        q_a, r_a = torch.linalg.qr(self.a.double().mT)
        return q_b, self.scale * (r_b @ r_a.mT), q_a


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """The weighted sum of updates of one weight: factors side by side, so the ranks add up."""
    b = [weight * update.scale * update.b.double() for update, weight in zip(updates, weights, strict=True)]
    a = [update.a.double() for update in updates]
    return Update(torch.cat(a, dim=-2), torch.cat(b, dim=-1), 1.0)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies in a directory.

    Attributes:
        path: The directory.
        record: Method, settings and base.
        fields: PEFT's configuration.
        updates: Full name of a layer, as PEFT names it -> its update; layers in the order of the model's blocks.
        others: Names of the tensors that are more than that: magnitudes of DoRA, modules that were trained whole.
    """

    path: Path
    record: AdapterRecord
    fields: Mapping[str, Any]
    updates: Mapping[str, Update]
    others: Sequence[str]


def adapter_directory(path: str | Path) -> Path:
    """Where the adapter of a run lies; a directory that is not a run is taken for an adapter itself."""
    path = Path(path)
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter, or that of a run.

    Raises:
        MissingFileError: There is none.
        AdapterError: It is broken, or of a kind that lorafit does not know.
    """
    directory = adapter_directory(path)
    record = read_record(directory)
    fields = read_fields(directory / CONFIG_FILE)
    tensors = read_weights(directory)
    factors: dict[str, dict[str, Tensor]] = {}
    problems, others = [], []
    for key, tensor in sorted(tensors.items()):
        if match := _KEY.fullmatch(key):
            factors.setdefault(match["place"], {})[match["part"]] = tensor
        else:
            others.append(key)
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key} holds numbers that are not finite")
    problems += [f"{place} has only one of two factors" for place, parts in factors.items() if len(parts) == 1]
    updates = {}
    for place in sorted(factors, key=in_order):
        if len(factors[place]) == 2:
            update = _update(place, factors[place]["A"], factors[place]["B"], record, fields)
            updates[place] = update
            if update.a.shape[-2] != update.rank:
                problems.append(f"{place} has {update.a.shape[-2]} rows of A for {update.rank} columns of B")
    if not factors:
        problems.append("it holds no low-rank update")
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(f"{directory} is not an adapter that can be used: {'; '.join(problems[:5])}{rest}")
    return Adapter(directory, record, fields, updates, others)


def _update(place: str, a: Tensor, b: Tensor, record: AdapterRecord, fields: Mapping[str, Any]) -> Update:
    """The factors of a layer, or those of a stack of experts, which PEFT keeps in two matrices."""
    config = record.config.at(place) if isinstance(record.config, LoRA) else record.config
    owner, rank = place.split(".base_layer")[0], config.rank
    stacks = (name.rpartition(".")[0] for name in fields.get("target_parameters") or [])
    if any(f".{owner}".endswith(f".{name}") for name in stacks) and len(a) % rank == 0:
        if fields.get("rank_pattern") or fields.get("alpha_pattern"):
            raise AdapterError(f"{place}: experts with ranks or alphas of their own are not read without their model")
        a = a.unflatten(0, (-1, rank))
        b = b.unflatten(1, (rank, -1)).permute(2, 0, 1)
    return Update(a, b, config.scale)


def in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, so that block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
