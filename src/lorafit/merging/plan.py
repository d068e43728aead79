"""From a run to a merge that is known to fit, and to the file.

The steps: *detect* that this run can be merged and that its base has, by hash, the tensors that it was trained on (a
merged file has not, so nothing is merged twice); *plan* what becomes of which tensor; *validate* that it fits; *apply*.
What was written is then *verified* side by side with the base (``verify.py``) and measured (``certificate.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lorafit.adapters import load_adapter
from lorafit.config import QALoRA, Requantize
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_writer import rewrite
from lorafit.errors import MergeError
from lorafit.formats import block_format
from lorafit.merging.exact import OffsetChange, hold_stored
from lorafit.merging.requantize import Packing, RoundedChange, packed_weights, rounded_changes
from lorafit.merging.run import DEFAULT_TOLERANCE, Run, check_tolerance, detect
from lorafit.models.base import Base
from lorafit.modules import AdapterModule, PackedEmbedding, QALoRALinear, adapter_modules
from lorafit.modules.whole import TrainedCopy, TrainedTokens


@dataclass(frozen=True)
class Plan:
    """A merge that is known to fit.

    Attributes:
        run: The run.
        base: The loaded base with the adapter on it, computing with the stored offsets: the run itself.
        base_sha256: Hash of the base file.
        file: The base file.
        changes: What is written, in the order of the file.
        rounded_otherwise: Offsets that this machine, computing them anew from A and B, rounds to a neighbour.
        requantize: What tensors are rounded to that do not merge exactly; None if there are none.
        tolerance: By how much that may raise the held-out loss.
    """

    run: Run
    base: Base
    base_sha256: str
    file: GGUFFile
    changes: tuple[OffsetChange | RoundedChange, ...]
    rounded_otherwise: int
    requantize: Requantize | None = None
    tolerance: float = DEFAULT_TOLERANCE


def plan(
    run: str | Path,
    *,
    base: str | None = None,
    requantize: Requantize | None = None,
    certificate_tolerance: float | None = None,
    packing: Packing = "best",
) -> Plan:
    """Detect what a run is, work out its merge and validate it; nothing is written.

    Args:
        run: Directory of a run.
        base: Where its base is; by default where the adapter says.
        requantize: The format to which tensors are rounded that do not merge exactly; ``keep`` for the format of each.
        certificate_tolerance: By how much that may raise the held-out loss, in nats per token.
        packing: How sums are rounded; others than ``best`` are for comparison.

    Raises:
        MissingFileError: There is no such run, it is not complete, or its base has gone.
        MergeError: Its base is no GGUF file or not what it was trained on, its stored offsets do not fit the file or do
            not belong to its adapter, it trained what no tensor of the file can hold, or ``requantize`` is missing,
            idle or impossible.
    """
    found = detect(run, base)
    loaded = _file_base(found)
    load_adapter(loaded.model, found.adapter, hold_offsets=False)
    adapters = _changing(adapter_modules(loaded.model))
    file = GGUFFile.open(loaded.path)
    _check_tensors(found, loaded, adapters, file)
    exact = {name: module for name, module in adapters.items() if isinstance(module, QALoRALinear)}
    beside = {name: module for name, module in adapters.items() if name not in exact}
    requantize, tolerance = _check_options(found, beside, requantize, certificate_tolerance)
    changes: list[OffsetChange | RoundedChange] = []
    rounded_otherwise = hold_stored(found.adapter, exact) if exact else 0
    for name, module in exact.items():
        changes.append(_offset_change(name, module, file))
    if requantize is not None:
        for name, other in beside.items():
            changes += rounded_changes(name, other, file.tensors, requantize, packing)
    changes.sort(key=lambda change: change.tensor.offset)
    sha256 = fingerprint(loaded.path)
    return Plan(found, loaded, sha256, file, tuple(changes), rounded_otherwise, requantize, tolerance)


def apply(plan: Plan, target: str | Path) -> None:
    """Write the merged file; the caller makes it appear whole.

    Memory: the file goes through a small buffer, some rows of a tensor at a time.

    Args:
        plan: What to write.
        target: The file to write.

    Raises:
        ModelError: The base was written to after it was loaded.
    """
    plan.base.check_unchanged()
    rewrite(plan.file, target, {change.tensor.name: change for change in plan.changes})


def _file_base(run: Run) -> Base:
    """The base of a run, which must be a GGUF file as it lies on the disk."""
    record = run.record
    instead = f"merge into a directory and export that, or ship {run.adapter} beside the base"
    if record.quantize:
        raise MergeError(
            f"{run.path} was trained on {record.base} as it is after --quantize {record.quantize}: there is no GGUF "
            f"file of these blocks to merge into; {instead}"
        )
    base = run.load_base(run.config.compute)
    if not base.path.is_file():
        raise MergeError(f"{base.path} is no GGUF file to merge into; {instead}")
    return base


def _changing(adapters: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Those that change a tensor: not a head that reads the trained rows of its embedding."""
    return {name: each for name, each in adapters.items() if not (isinstance(each, TrainedTokens) and each.tied)}


def _check_options(
    run: Run, beside: Mapping[str, AdapterModule], requantize: Requantize | None, tolerance: float | None
) -> tuple[Requantize | None, float]:
    """What does not merge exactly needs a format to be rounded to, and without that there is nothing to round."""
    if requantize is not None and requantize not in get_args(Requantize):
        raise MergeError(f"--requantize {requantize} is not one of {', '.join(get_args(Requantize))}")
    packed = [part for module in beside.values() for part in packed_weights(module)]
    if requantize is None and any(block_format(part.format_name).elements > 1 for part in packed):
        what = f"plain LoRA on {len(beside)} layers (--frozen-tensors lora), which merge"
        if not isinstance(run.record.config, QALoRA):
            what = f"with --method {run.record.config.method}, whose updates of {len(beside)} layers merge"
        raise MergeError(
            f"{run.path} trained {what} into a quantised file only by being rounded anew: say to what, as in "
            f"--requantize keep or q8_0, or ship {run.adapter} beside the base"
        )
    if requantize is not None and not beside:
        raise MergeError(f"--requantize {requantize} has no effect on {run.path}, of which every layer merges exactly")
    if tolerance is not None and not beside:
        raise MergeError(
            f"--certificate-tolerance {tolerance:g} has no effect on {run.path}, of which every layer merges exactly: "
            "the loss may not change at all"
        )
    return requantize or ("keep" if beside else None), check_tolerance(run, tolerance)


def _check_tensors(run: Run, base: Base, adapters: Mapping[str, AdapterModule], file: GGUFFile) -> None:
    """Every layer has tensors in the file that are its own."""
    parts = list(base.model.modules())
    shared: set[str] = set()
    if base.model.config.tie_word_embeddings and not any(isinstance(p, TrainedTokens) and p.tied for p in parts):
        shared = {part.packed.name for part in parts if isinstance(part, PackedEmbedding)}
    if no_matrix := [name for name, module in adapters.items() if not _is_matrix(module)]:
        name, more = no_matrix[0], f" and {len(no_matrix) - 1} more like it" if no_matrix[1:] else ""
        raise MergeError(
            f"{run.path} trained the {' and '.join(adapters[name].adapter_parameters())} of {name}{more}, but a merge "
            "into a GGUF file changes matrices only; merge into a directory and export that"
        )
    for name, module in adapters.items():
        packed = packed_weights(module)
        infos = [file.tensors.get(part.name) for part in packed]
        if any(
            info is None or info.format != part.format_name or info.shape[-2:] != part.shape
            for part, info in zip(packed, infos, strict=True)
        ):
            raise MergeError(f"{file.path} has not the tensor that {name} was loaded from; did it change meanwhile?")
        if any(part.name in shared for part in packed):
            raise MergeError(
                f"the tensor of {name} is read as the table of embeddings and as the head, and merging would change "
                f"both; merge into a directory, which keeps two, or ship {run.adapter} beside the base"
            )


def _is_matrix(module: AdapterModule) -> bool:
    return bool(packed_weights(module)) and not (isinstance(module, TrainedCopy) and module.copies.keys() != {"weight"})


def _offset_change(name: str, module: QALoRALinear, file: GGUFFile) -> OffsetChange:
    packed = module.base.packed
    tensor, offsets = file.tensors[packed.name], module.merged_offsets()
    return OffsetChange(name, tensor, module.trained.format_name, offsets, packed.rows)
