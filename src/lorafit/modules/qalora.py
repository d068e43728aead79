"""QA-LoRA (arXiv 2309.14717, section 3.3): an update that is constant within a block folds into the block's offset.

A packed weight is w = d·q + m with one m for each block of g weights. Here A is [rank, G], one column for each of the
G = in_dim/g blocks of a row, B is [out_dim, rank], and the model that is trained is the merged model itself:

    m' = fp16(m + s·B A)        W' = d·q + m'        y = W' x

There is no adapter branch: the forward pass unpacks with m' and multiplies once. Rounding to half precision is passed
through as the identity (a straight-through estimator), so that m' has the gradient of W' summed over each block. That
costs 1/g of a full weight gradient, because the input can be summed over the blocks first (``product``). A starts
uniform within 1/√in_dim: block sums are √g times larger than single inputs, so this gives the update the size that
LoRA's has. Block-wise A is the same as plain LoRA with every column repeated g times, which is how it is saved.

A layer whose blocks have no offset, but whose format can be promoted to one that has (``lorafit.formats.promote``), is
trained on promoted blocks. These are new memory. The layer keeps the blocks of the file too and computes with those
while the adapter is disabled; their pages are given back after use, so that no weight stays in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lorafit.config import QALoRA
from lorafit.containers.mapped import release
from lorafit.errors import AdapterError, FormatError
from lorafit.formats import PROMOTED, block_format, promote, read_offsets
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import PackedLinear, PackedWeight, chooses_type
from lorafit.modules.product import Part, product

T = TypeVar("T")


def has_offsets(format_name: str) -> bool:
    """Whether QA-LoRA can train a weight in this format, promoted if need be."""
    return format_name in PROMOTED or block_format(format_name).offset_at is not None


class QALoRALinear(AdapterModule):
    """A packed linear layer whose block offsets are trained: [..., in_dim] -> [..., out_dim].

    Args:
        base: A packed layer in a format that has offsets or can be promoted to one.
        config: Rank and scaling.

    Attributes:
        promoted: The base's weight in a format with offsets, if its own has none.

    Raises:
        AdapterError: There are no offsets, or the rank exceeds the number of blocks in a row.
    """

    base: PackedLinear
    promoted: PackedWeight | None
    offsets: Tensor

    def __init__(self, base: PackedLinear, config: QALoRA) -> None:
        super().__init__(base)
        packed = base.packed
        if not has_offsets(packed.format_name):
            raise AdapterError(f"{packed.name}: {packed.format_name} blocks have no offset for QA-LoRA to train")
        target = PROMOTED.get(packed.format_name)
        self.group = block_format(target or packed.format_name).elements
        groups = self.in_features // self.group
        if config.rank > groups:
            raise AdapterError(
                f"{packed.name}: rank {config.rank} exceeds the {groups} blocks in a row, so a smaller rank can do as "
                f"much; use --rank {groups} or less"
            )
        self.scale = config.scale
        self.promoted = _shared(packed, _PROMOTED_WEIGHTS, _promoted) if target else None
        self.register_buffer("offsets", _shared(self.trained, _OFFSETS, _read_offsets), persistent=False)
        device = self.trained.blocks.device
        self.qalora_A = nn.Parameter(torch.empty(config.rank, groups, device=device))
        self.qalora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))
        nn.init.uniform_(self.qalora_A, -(self.in_features**-0.5), self.in_features**-0.5)
        self._held: Tensor | None = None

    @property
    def trained(self) -> PackedWeight:
        """The weight whose offsets are trained: the base's own, or the promoted one."""
        return self.base.packed if self.promoted is None else self.promoted

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"qalora_A": self.qalora_A, "qalora_B": self.qalora_B}

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.qalora_A.detach().repeat_interleave(self.group, dim=1), self.qalora_B.detach()

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        parameter = self.qalora_B
        if part == "A":
            parameter, columns = self.qalora_A, value[:, :: self.group]
            if not torch.equal(columns.repeat_interleave(self.group, dim=1), value):
                raise AdapterError("is not constant within blocks, as QA-LoRA needs")
            value = columns
        with torch.no_grad():
            parameter.copy_(value)

    def delta_weight(self) -> Tensor:
        """What merging changes: m' - m, so the rounding to half precision is in it."""
        moved = self.merged_offsets().float() - self.offsets.float()
        return moved.repeat_interleave(self.group, dim=1)

    @torch.no_grad()
    def merged_offsets(self) -> Tensor:
        """m' = fp16(m + s·B A), float16 [out_dim, G] in the weight's row order."""
        if self._held is not None:
            return self._held
        update = torch.mm(self.qalora_B, self.qalora_A)
        return self.offsets.to(update.dtype).add(update, alpha=self.scale).to(torch.float16)

    def hold(self, offsets: Tensor | None) -> Tensor | None:
        """Fix m' to these values, or release them with None; returns what was held before. See ``offsets_held``."""
        before, self._held = self._held, offsets
        return before

    def train(self, mode: bool = True) -> QALoRALinear:
        """As usual; and offsets that are held are released for training, in which they move."""
        if mode:
            self._held = None
        return super().train(mode)

    def part(self) -> Part:
        """The layer as ``product`` takes it."""
        return Part(
            self.trained, self.base.bias, self.qalora_A, self.qalora_B, self.scale, self.merged_offsets(), self.group
        )

    @chooses_type
    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if torch.is_grad_enabled():
            return product(x, [self.part()])[0]
        y = self.trained.product(x, self.merged_offsets())
        return y if self.base.bias is None else y + self.base.bias


# What several adapters of one weight have in common, kept as long as one of them lives: the promoted weight, offsets.
_PROMOTED_WEIGHTS: WeakKeyDictionary[PackedWeight, ref[PackedWeight]] = WeakKeyDictionary()
_OFFSETS: WeakKeyDictionary[PackedWeight, ref[Tensor]] = WeakKeyDictionary()


def _shared(
    packed: PackedWeight, known: WeakKeyDictionary[PackedWeight, ref[T]], make: Callable[[PackedWeight], T]
) -> T:
    reference = known.get(packed)
    value = reference() if reference else None
    if value is None:
        value = make(packed)
        known[packed] = ref(value)
    return value


def _read_offsets(packed: PackedWeight) -> Tensor:
    offsets = read_offsets(packed.blocks, packed.format_name)
    return offsets if packed.rows is None else offsets[packed.rows]


def _promoted(packed: PackedWeight) -> PackedWeight:
    try:
        blocks, format_name = promote(packed.blocks, packed.format_name)
    except FormatError as error:
        raise AdapterError(f"{packed.name}: {error}; leave it out with --targets") from None
    release(packed.blocks)
    return PackedWeight(blocks, format_name, rows=packed.rows, name=packed.name)


@contextmanager
def offsets_held(model: nn.Module) -> Iterator[None]:
    """Compute every m' once and keep it: for many forward passes without a change of parameters, such as decoding."""
    modules = [module for module in model.modules() if isinstance(module, QALoRALinear)]
    before = [module.hold(module.merged_offsets()) for module in modules]
    try:
        yield
    finally:
        for module, offsets in zip(modules, before, strict=True):
            module.hold(offsets)
