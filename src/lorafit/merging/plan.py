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
from lorafit.merging.exact import OffsetChange, hold_stored
from lorafit.merging.requantize import RoundedChange, packed_weights, rounded_changes
from lorafit.merging.run import DEFAULT_TOLERANCE, Run, check_tolerance, detect
from lorafit.models.base import Base
from lorafit.modules import AdapterModule, PackedEmbedding, QALoRALinear, adapter_modules


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
        requantize: What tensors with plain LoRA are rounded to; None if there are none.
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


def plan(run: str | Path, *, requantize: Requantize | None = None, certificate_tolerance: float | None = None) -> Plan:
    """Detect what a run is, work out its merge and validate it; nothing is written.

    Args:
        run: Directory of a run.
        requantize: The format to which tensors with plain LoRA are rounded; ``keep`` for the format of each.
        certificate_tolerance: By how much that may raise the held-out loss, in nats per token.

    Raises:
        MissingFileError: There is no such run, it is not complete, or its base has gone.
        MergeError: Its method has no exact merge, its base is not the file that it was trained on, its stored offsets
            do not fit the file or do not belong to its adapter, or ``requantize`` is missing, idle or impossible.
    """
    found = detect(run)
    base = _mergeable_base(found)
    load_adapter(base.model, found.adapter, hold_offsets=False)
    adapters = adapter_modules(base.model)
    file = GGUFFile.open(base.path)
    _check_tensors(base, adapters, file)
    exact = {name: module for name, module in adapters.items() if isinstance(module, QALoRALinear)}
    beside = {name: module for name, module in adapters.items() if name not in exact}
    tolerance = _check_options(found, len(beside), requantize, certificate_tolerance)
    rounded_otherwise = hold_stored(found.adapter, exact)
    changes: list[OffsetChange | RoundedChange] = []
    for name, module in exact.items():
        changes.append(_offset_change(name, module, file))
    if requantize is not None:
        for name, other in beside.items():
            changes += rounded_changes(name, other, file.tensors, requantize)
    changes.sort(key=lambda change: change.tensor.offset)
    sha256 = fingerprint(base.path)
    return Plan(found, base, sha256, file, tuple(changes), rounded_otherwise, requantize, tolerance)


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


def _mergeable_base(run: Run) -> Base:
    """The base of a run that can be merged into a GGUF file."""
    record = run.record
    if record.quantize:
        raise MergeError(
            f"{run.path} was trained on {record.base} as it is after --quantize {record.quantize}: there is no GGUF "
            f"file of these blocks to merge into; merge into a directory, or ship {run.adapter} beside the base"
        )
    if not isinstance(record.config, QALoRA):
        raise MergeError(
            f"{run.path} was trained with --method {record.config.method}, whose update does not fit into the blocks "
            f"of a GGUF file; ship {run.adapter} beside the base, or train with --method qalora"
        )
    base = run.load_base(run.config.compute)
    if not base.path.is_file():
        raise MergeError(
            f"{base.path} is no GGUF file to merge into; merge into a directory, or ship {run.adapter} beside it"
        )
    return base


def _check_options(run: Run, beside: int, requantize: Requantize | None, tolerance: float | None) -> float:
    """Tensors with plain LoRA need a format to be rounded to, and without them there is nothing to round."""
    if requantize is not None and requantize not in get_args(Requantize):
        raise MergeError(f"--requantize {requantize} is not one of {', '.join(get_args(Requantize))}")
    if beside and requantize is None:
        raise MergeError(
            f"{run.path} trained plain LoRA on {beside} layers (--frozen-tensors lora), which merge only by being "
            f"rounded anew: say to what, as in --requantize q8_0, or ship {run.adapter} beside the base"
        )
    if requantize is not None and not beside:
        raise MergeError(f"--requantize {requantize} has no effect on {run.path}, of which every layer merges exactly")
    if tolerance is not None and requantize is None:
        raise MergeError(
            f"--certificate-tolerance {tolerance:g} has no effect without --requantize: the loss may not change at all"
        )
    return check_tolerance(run, tolerance)


def _check_tensors(base: Base, adapters: Mapping[str, AdapterModule], file: GGUFFile) -> None:
    """Every layer has tensors in the file that are its own."""
    tables = {module.packed.name for module in base.model.modules() if isinstance(module, PackedEmbedding)}
    for name, module in adapters.items():
        packed = packed_weights(module)
        infos = [file.tensors.get(part.name) for part in packed]
        if not packed or any(
            info is None or info.format != part.format_name or info.shape[-2:] != part.shape
            for part, info in zip(packed, infos, strict=True)
        ):
            raise MergeError(f"{file.path} has not the tensor that {name} was loaded from; did it change meanwhile?")
        if any(part.name in tables for part in packed):
            raise MergeError(
                f"the tensor of {name} is the table of embeddings too, which merging would change; train without that "
                "layer, or ship the adapter beside the base"
            )


def _offset_change(name: str, module: QALoRALinear, file: GGUFFile) -> OffsetChange:
    packed = module.base.packed
    tensor, offsets = file.tensors[packed.name], module.merged_offsets()
    return OffsetChange(name, tensor, module.trained.format_name, offsets, packed.rows)
