"""The exact merge: a QA-LoRA run becomes the file that it was trained on, with other block offsets.

A packed weight is w = d·q + m. QA-LoRA trains m' = fp16(m + s·B A), one number for each block, and computes with
exactly these; a block has room for exactly these; so the merged model *is* the trained one, in as many bytes.
Merging copies the base file and writes the stored m' into the two bytes of each offset. Nothing is computed,
therefore nothing can round.

The steps: *detect* that this run can be merged and that its base is, by hash, the file that it was trained on (a
merged file is not, so nothing is merged twice); *plan* which tensor gets which offsets; *validate* that they fit;
*apply*; and *verify* by reading what was written, side by side with the base. Rows are stored in Hugging Face's order,
and go to where the file has them only when they are written.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lorafit.adapters import load_adapter, read_record
from lorafit.adapters.peft import OFFSETS_FILE, read_offsets_file
from lorafit.config import QALoRA, TrainConfig, read_settings
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile, TensorInfo
from lorafit.errors import MergeError, MissingFileError
from lorafit.formats import block_format, write_offsets
from lorafit.models.base import Base
from lorafit.models.load import load_base
from lorafit.modules import QALoRALinear, adapter_modules

_PIECE_BYTES = 1 << 16  # read at a time

# How many recomputed offsets may round otherwise than in training. A sum in float32 is off by 1e-7 of its size and half
# precision rounds in steps of 5e-4 to 1e-3, so about one in a thousand lies so near to an edge that the order of
# summing decides.
_ROUNDED_OTHERWISE = 0.01


@dataclass(frozen=True)
class Change:
    """New offsets for one tensor of the file.

    Attributes:
        module: Name of the layer in the model.
        tensor: The tensor in the file.
        offsets: float16 [rows, blocks in a row], rows in Hugging Face's order.
        rows: int64 [rows]; row i of the layer is row ``rows[i]`` of the tensor. None where the orders agree.
    """

    module: str
    tensor: TensorInfo
    offsets: Tensor
    rows: Tensor | None

    def in_file_order(self) -> Tensor:
        """The offsets as the file has them: float16 [rows, blocks in a row]."""
        if self.rows is None:
            return self.offsets
        moved = torch.empty_like(self.offsets)
        moved[self.rows] = self.offsets
        return moved


@dataclass(frozen=True)
class Plan:
    """A merge that is known to fit.

    Attributes:
        run: Directory of the run.
        config: Its settings.
        base: The loaded base with the adapter on it, computing with the stored offsets: the run itself.
        base_sha256: Hash of the base file.
        file: The base file.
        changes: What is written, in the order of the file.
        rounded_otherwise: Offsets that this machine, computing them anew from A and B, rounds to a neighbour.
    """

    run: Path
    config: TrainConfig
    base: Base
    base_sha256: str
    file: GGUFFile
    changes: tuple[Change, ...]
    rounded_otherwise: int


@dataclass(frozen=True)
class Comparison:
    """A merged file that is the base but for the trained offsets.

    Attributes:
        sha256: Its hash.
        size: Its bytes.
        bytes_changed: How many of them differ from the base; all lie in offsets.
    """

    sha256: str
    size: int
    bytes_changed: int


def plan(run: str | Path) -> Plan:
    """Detect what a run is, work out its merge and validate it; nothing is written.

    Args:
        run: Directory of a run.

    Raises:
        MissingFileError: There is no such run, it is not complete, or its base has gone.
        MergeError: Its method has no exact merge, its base is not the file that it was trained on, or its stored
            offsets do not fit the file or do not belong to its adapter.
    """
    run = Path(run)
    base, config, sha256 = _detect(run)
    load_adapter(base.model, run / "adapter", hold_offsets=False)
    modules = {name: module for name, module in adapter_modules(base.model).items() if isinstance(module, QALoRALinear)}
    stored = read_offsets_file(run / "adapter")
    file = GGUFFile.open(base.path)
    _check_fit(run, modules, stored, file)
    rounded_otherwise = _check_origin(run, modules, stored)
    for name, module in modules.items():
        module.hold(stored[name])
    changes = [
        Change(name, file.tensors[module.base.packed.name], stored[name], module.base.packed.rows)
        for name, module in modules.items()
    ]
    changes.sort(key=lambda change: change.tensor.offset)
    return Plan(run, config, base, sha256, file, tuple(changes), rounded_otherwise)


def apply(plan: Plan, target: str | Path) -> None:
    """Write the merged file; the caller makes it appear whole.

    Memory: the file is copied through a small buffer, then each changed tensor is patched on its own.

    Args:
        plan: What to write.
        target: The file to write.

    Raises:
        ModelError: The base was written to after it was loaded.
    """
    plan.base.check_unchanged()
    # Not shutil.copyfile: when the disk is full, that names the source.
    with plan.base.path.open("rb") as source, Path(target).open("wb") as copy:
        shutil.copyfileobj(source, copy)
        for change in plan.changes:
            blocks = plan.file.blocks(change.tensor.name)
            copy.seek(change.tensor.offset)
            copy.write(write_offsets(blocks, change.tensor.format, change.in_file_order()).numpy().data)


def verify(plan: Plan, written: str | Path) -> Comparison:
    """Compare a merged file with the base, reading both side by side.

    Args:
        plan: What should have been written.
        written: The merged file.

    Raises:
        MergeError: A byte outside the changed offsets is not the base's, or an offset is not the stored one.
    """
    size = plan.base.path.stat().st_size
    if Path(written).stat().st_size != size:
        raise MergeError(f"{written} has not the {size:,} bytes of {plan.base.path}; check the disk")
    changed = elsewhere = wrong = 0
    with plan.base.path.open("rb") as base, Path(written).open("rb") as merged:
        both = _SideBySide(base, merged)
        for change in plan.changes:
            block = block_format(change.tensor.format)
            assert block.offset_at is not None
            field = slice(block.offset_at, block.offset_at + 2)
            elsewhere += sum(_differing(*pair) for pair in both.read_until(change.tensor.offset))
            expected = change.in_file_order().contiguous().view(torch.uint8).numpy().reshape(-1, 2)
            done = 0
            for pair in both.read_until(change.tensor.offset + change.tensor.nbytes, block.nbytes):
                old, new = (piece.reshape(-1, block.nbytes) for piece in pair)
                in_field = _differing(old[:, field], new[:, field])
                changed += in_field
                elsewhere += _differing(old, new) - in_field
                wrong += _differing(new[:, field], expected[done : done + len(new)])
                done += len(new)
        elsewhere += sum(_differing(*pair) for pair in both.read_until(size))
    of_base, of_merged = (digest.hexdigest() for digest in both.digests)
    if elsewhere or wrong or of_base != plan.base_sha256:
        raise MergeError(
            f"{written} is not the base with the trained offsets ({wrong:,} bytes of offsets and {elsewhere:,} others "
            f"are wrong): check the disk, and that nothing else writes to {plan.base.path}"
        )
    return Comparison(of_merged, size, changed)


def _detect(run: Path) -> tuple[Base, TrainConfig, str]:
    """The base of a run that can be merged, the run's settings, and the hash of the base."""
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise MissingFileError(f"{run} is not a run: it has no directory adapter/; give what `lorafit train` wrote")
    record = read_record(adapter)
    if not isinstance(record.config, QALoRA):
        raise MergeError(
            f"{run} was trained with --method {record.config.method}, whose update does not fit into the blocks "
            f"of a GGUF file; ship {adapter} beside the base, or train with --method qalora"
        )
    config = TrainConfig(**read_settings(run / "config.yaml"))
    base = load_base(record.base, compute=config.compute)
    sha256 = fingerprint(base.path)
    if sha256 != record.base_sha256:
        raise MergeError(
            f"{base.path} is not the file that {run} was trained on (its SHA-256 is {sha256[:12]}…, that one's "
            f"{record.base_sha256[:12]}…): it is another model or one that was merged already; put the original back"
        )
    return base, config, sha256


def _check_fit(run: Path, modules: Mapping[str, QALoRALinear], stored: Mapping[str, Tensor], file: GGUFFile) -> None:
    """Every layer has its offsets and a tensor that takes them, and no offsets are left over."""
    problems = [f"{name} is no layer of the adapter" for name in stored if name not in modules]
    for name, module in modules.items():
        packed = module.base.packed
        info = file.tensors.get(packed.name)
        offsets = stored.get(name)
        if offsets is None:
            problems.append(f"{name} is missing")
        elif offsets.dtype != torch.float16 or offsets.shape != module.offsets.shape:
            expected = f"torch.float16 {list(module.offsets.shape)}"
            problems.append(f"{name} is {offsets.dtype} {list(offsets.shape)}, not {expected}")
        elif not bool(torch.isfinite(offsets).all()):
            problems.append(f"{name} holds numbers that are not finite")
        if info is None or info.format != packed.format_name or info.shape != packed.shape:
            problems.append(f"{packed.name} in {file.path} is not what {name} was loaded from")
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError(f"{run / 'adapter' / OFFSETS_FILE} cannot be merged: {'; '.join(problems[:5])}{rest}")


def _check_origin(run: Path, modules: Mapping[str, QALoRALinear], stored: Mapping[str, Tensor]) -> int:
    """The stored offsets are those of the stored A and B; returns how many round otherwise on this machine.

    Another processor may add up B A in another order. That moves a number by far less than half precision can tell,
    so it may go to its neighbour where it lies at the edge between two: at most one unit in the last place of the
    larger of m and m' (m' itself can be nearly zero where m and the update cancel), and seldom.
    """
    otherwise = total = 0
    for name, module in modules.items():
        kept = stored[name].float()
        gap = (module.merged_offsets().float() - kept).abs()
        if bool((gap > _unit_in_last_place(torch.maximum(kept.abs(), module.offsets.float().abs()))).any()):
            raise MergeError(f"{run}: the stored offsets of {name} are not those of its adapter; were files exchanged?")
        otherwise += int(gap.count_nonzero())
        total += gap.numel()
    if otherwise > _ROUNDED_OTHERWISE * total:
        raise MergeError(
            f"{run}: {otherwise:,} of {total:,} stored offsets are not those of the adapter; were files exchanged?"
        )
    return otherwise


def _unit_in_last_place(values: Tensor) -> Tensor:
    """Distance of neighbouring half-precision numbers at the size of ``values``, non-negative float32."""
    exponent = torch.frexp(values).exponent.clamp(min=-13)  # from there down numbers are equally spaced
    return torch.ldexp(torch.ones_like(values), exponent - 11)


class _SideBySide:
    """Two files read in step, and hashed on the way."""

    def __init__(self, *files: BinaryIO) -> None:
        self.files = files
        self.digests = [hashlib.sha256() for _ in files]
        self.at = 0

    def read(self, count: int) -> list[np.ndarray]:
        """The next ``count`` bytes of each, or fewer at its end."""
        pieces = [file.read(count) for file in self.files]
        for digest, piece in zip(self.digests, pieces, strict=True):
            digest.update(piece)
        self.at += count
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def read_until(self, end: int, unit: int = 1) -> Iterator[list[np.ndarray]]:
        """All up to ``end``, in pieces of whole units."""
        step = _PIECE_BYTES // unit * unit
        while self.at < end:
            yield self.read(min(step, end - self.at))


def _differing(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.count_nonzero(one != other))
