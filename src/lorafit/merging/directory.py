"""A merge into a directory of safetensors: detect, plan, validate, apply; then compare and measure.

Weights are written one tensor at a time, and read again beside the same computed once more. After that the loss on the
held-out rows is measured, of the base, of the run, and of what was written, opened again. Matrices that are not packed
stay in their files meanwhile, so that no model takes memory as a whole.

Where the base was quantised, ``onto`` names its original, to which the update is added instead. The update was trained
beside the errors of the quantised weights, so this is another model than the one that was trained. How far the weights
are from one another, and what either is worth, is measured and said.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.containers.atomic import fingerprint
from lorafit.containers.identity import hash_tensors
from lorafit.errors import LorafitWarning, MergeError
from lorafit.formats import block_format
from lorafit.merging.engine import NO_ROWS, NotMeasured
from lorafit.merging.run import HeldOut, Run, check_loss, check_tolerance, detect
from lorafit.merging.weights import merged_tensors
from lorafit.models.base import Base
from lorafit.models.directory import MERGED, ORIGIN, merges, said_of_itself
from lorafit.models.load import is_full_precision, load_base
from lorafit.models.saving import Rounding, compare_directory, save_directory, short, squared_error
from lorafit.models.unpacked import Unpacked, unpacked_tensors
from lorafit.modules import adapters_disabled

# Relative difference of weights: quantised to 2 bits they are within 0.4 of their original, those of another model 1.4.
_UNRELATED = 0.5


@dataclass(frozen=True)
class Original:
    """The original that an update was added to, beside the quantised base that it was trained on.

    Attributes:
        name: Its name when the certificate was made.
        tensors_sha256: Hash of its tensors.
        relative_difference: Root mean square of the differences between the two, relative to that of the original, over
            the tensors that differ.
        differing: How many tensors differ.
        loss: Its loss on the held-out rows, without the update; None if there are no rows.
    """

    name: str
    tensors_sha256: str
    relative_difference: float
    differing: int
    loss: float | None


@dataclass(frozen=True)
class DirectoryCertificate:
    """What is known about a merged directory.

    Attributes:
        lorafit: Version that merged.
        run: Name of the run's directory.
        method: The method that it was trained with.
        base: Name of what it was trained on.
        base_tensors_sha256: Hash of the tensors there.
        base_checked: Whether the adapter said that it was trained beside these; those of other tools do not.
        quantize: What these were quantised to while they were loaded; None if they were not.
        onto: The original that the update was added to; None if it was added to the base that was trained on.
        output: Name of the directory.
        files: Name of each file of weights -> its hash.
        dtype: Type of the weights.
        tensors: How many there are.
        changed: How many of them the adapter changed.
        parameters: How many numbers they have.
        rounding: How far they are from the sums, which were computed in float32.
        held_out: Loss in lorafit.
    """

    lorafit: str
    run: str
    method: str
    base: str
    base_tensors_sha256: str
    base_checked: bool
    quantize: str | None
    onto: Original | None
    output: str
    files: dict[str, str]
    dtype: str
    tensors: int
    changed: int
    parameters: int
    rounding: Rounding
    held_out: HeldOut | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the merged directory."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class DirectoryPlan:
    """A merge into a directory that is known to fit.

    Attributes:
        run: The run.
        base: Its base in float32, with the adapter on it.
        original: What the update is added to instead of the base; None for the base.
        difference: How far the two are apart, and in how many tensors.
        tensors: What is written.
        changed: Names of those that the adapter changes.
        dtype: Type that they are rounded to.
        tolerance: By how much the loss may be above the run's.
    """

    run: Run
    base: Base
    original: Base | None
    difference: tuple[float, int]
    tensors: Mapping[str, Unpacked]
    changed: frozenset[str]
    dtype: torch.dtype
    tolerance: float

    @property
    def inputs(self) -> list[Path]:
        """What the merge reads, which its output must not replace."""
        return [self.run.path, self.base.path, *([self.original.path] if self.original else [])]


def plan_directory(
    run: str | Path,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    onto: str | None = None,
    certificate_tolerance: float | None = None,
) -> DirectoryPlan:
    """Detect what a run is, work out its merge and validate it; nothing is written.

    Args:
        run: Directory of a run.
        dtype: Type of the weights: float32, bfloat16 or float16.
        base: Where its base is; by default where the adapter says.
        onto: The original of a quantised base, to which the update is added instead.
        certificate_tolerance: By how much the held-out loss may be above the run's, in nats per token.

    Raises:
        MissingFileError: There is no such run, it is not complete, or its base has gone.
        MergeError: Its base is not what it was trained on, or ``onto`` is not its original.
        LorafitError: Base or adapter cannot be loaded.
    """
    found = detect(run, base)
    tolerance = check_tolerance(found, certificate_tolerance)
    loaded = found.load_base("fp32")
    original, difference = None, (0.0, 0)
    if onto is not None:
        original = _load_original(found, loaded, onto)
        difference = _difference(loaded, original)
    tensors, changed = merged_tensors(loaded.model, found.adapter, original.model if original else None)
    return DirectoryPlan(found, loaded, original, difference, tensors, frozenset(changed), dtype, tolerance)


def apply_directory(
    plan: DirectoryPlan, directory: Path, name: str, *, say: Callable[[str], None] = lambda text: None
) -> DirectoryCertificate:
    """Write a merge, read it again, and measure it; the caller makes the directory appear whole.

    Args:
        plan: What to write.
        directory: An empty directory.
        name: What it will be called.
        say: Is told what is going on.

    Raises:
        MergeError: A weight is too large for the type, what was written is not what should have been, or its loss is
            above the run's by more than the tolerance.
        ModelError: The base was written to after it was loaded.

    Warns:
        LorafitWarning: The update was added to something else than what it was trained beside.
    """
    run, base, dtype = plan.run, plan.base, plan.dtype
    tensors_sha256 = hash_tensors(base.path)
    say(f"writing {len(plan.tensors)} tensors, {len(plan.changed)} of them as trained in {run.path}")
    files = save_directory(base, directory, plan.tensors, dtype, _notes(plan, tensors_sha256))
    say("comparing what was written with the sums")
    rounding = compare_directory(directory, plan.tensors, dtype, name)
    for read in (base, plan.original):
        if read is not None:
            read.check_unchanged()
    held_out, original_loss = _measure(plan, directory, say)
    if isinstance(held_out, HeldOut):
        cause = f"rounding to --dtype {short(dtype)}" if plan.original is None else f"--onto {plan.original.path}"
        check_loss(held_out, plan.tolerance, name, cause)
    certificate = DirectoryCertificate(
        lorafit=__version__,
        run=run.name,
        method=run.record.config.method,
        base=base.path.name,
        base_tensors_sha256=tensors_sha256,
        base_checked=bool(run.record.base_sha256),
        quantize=run.record.quantize,
        onto=None
        if plan.original is None
        else Original(plan.original.path.name, hash_tensors(plan.original.path), *plan.difference, original_loss),
        output=name,
        files={file.name: fingerprint(file) for file in files},
        dtype=short(dtype),
        tensors=len(plan.tensors),
        changed=len(plan.changed),
        parameters=sum(math.prod(tensor.shape) for tensor in plan.tensors.values()),
        rounding=rounding,
        held_out=held_out,
    )
    _warn(certificate)
    return certificate


def _warn(certificate: DirectoryCertificate) -> None:
    original, held_out = certificate.onto, certificate.held_out
    if original is None:
        return
    base = f"{certificate.base} as {certificate.quantize}" if certificate.quantize else certificate.base
    losses = "their losses were not measured"
    if isinstance(held_out, HeldOut):
        losses = f"held-out loss without the adapter {original.loss:.4f}, and {held_out.base_loss:.4f} for {base}"
    warnings.warn(
        f"{certificate.run} was trained beside {base} and merged onto {original.name}, whose weights differ by "
        f"{original.relative_difference:.2%} (root mean square, {original.differing} tensors); {losses}; without "
        "--onto, what was trained is merged",
        LorafitWarning,
        stacklevel=2,
    )


def _load_original(run: Run, base: Base, onto: str) -> Base:
    if not is_full_precision(onto):
        raise MergeError(f"--onto {onto} is quantised; give the original, in full precision")
    if not base.origin and not any(_is_block(tensor.format) for tensor in unpacked_tensors(base.model).values()):
        raise MergeError(
            f"--onto {onto}: {run.path} was trained on {base.path} in full precision, and merges onto that only; leave "
            "--onto out"
        )
    original = load_base(onto, compute="fp32", mapped=True)
    if why := run.why_merged(original.path):
        raise MergeError(f"--onto {onto}: {why}; give the original")
    return original


def _difference(base: Base, original: Base) -> tuple[float, int]:
    """How far the tensors of two models that should be alike are apart, and how many differ."""
    ours, theirs = unpacked_tensors(base.model), unpacked_tensors(original.model)
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (ours, theirs)]
    if shapes[0] != shapes[1] or base.model.config.model_type != original.model.config.model_type:
        raise MergeError(f"--onto {original.path} is no original of {base.path}: it has other tensors")
    error = size = 0.0
    differing = 0
    for name, tensor in ours.items():
        # Both may unpack into the same buffer.
        part = squared_error(tensor.values(torch.float32).clone(), theirs[name].values(torch.float32))
        if part[0]:
            error, size, differing = error + part[0], size + part[1], differing + 1
    difference = math.sqrt(error / size) if size else math.inf if error else 0.0
    if difference > _UNRELATED:
        raise MergeError(
            f"--onto {original.path} is no original of {base.path}: their weights differ by {difference:.0%} of their "
            "size, as those of another model do"
        )
    return difference, differing


def _notes(plan: DirectoryPlan, tensors_sha256: str) -> dict[str, Any]:
    """What config.json says about where the weights come from, and what of it the tensors contradict."""
    target = plan.original or plan.base
    merge = {
        "run": plan.run.name,
        "adapter_sha256": fingerprint(plan.run.adapter),
        "base": plan.base.path.name,
        "base_tensors_sha256": tensors_sha256,
        "onto": plan.original.path.name if plan.original else None,
    }
    notes: dict[str, Any] = {MERGED: [*merges(target.path), merge]}
    formats = {name: tensor.format for name, tensor in plan.tensors.items() if _is_block(tensor.format)}
    if formats:  # who quantises these weights does it for the second time
        notes[ORIGIN] = {"file": target.path.name, "sha256": fingerprint(target.path), "formats": formats}
        notes[ORIGIN]["general"] = said_of_itself(target.path)
    elif plan.original:
        notes[ORIGIN] = getattr(plan.original.model.config, ORIGIN, None)
    if "lm_head.weight" in plan.tensors:
        notes["tie_word_embeddings"] = False
    return notes


def _is_block(format_name: str | None) -> bool:
    return format_name is not None and block_format(format_name).elements > 1


def _measure(
    plan: DirectoryPlan, written: Path, say: Callable[[str], None]
) -> tuple[HeldOut | NotMeasured, float | None]:
    """Losses of base, run and what was written, and that of the original, one model after the other."""
    run = plan.run
    rows = run.held_out(plan.base.tokenizer)
    if not rows:
        return NO_ROWS, None
    say(f"measuring run and merged model on {len(rows.documents)} held-out rows")
    tuned = run.load()
    with adapters_disabled(tuned.model):
        before = rows.measure(tuned.model)
    beside = rows.measure(tuned.model)
    compute = str(tuned.compute).removeprefix("torch.")
    del tuned

    def loss(path: Path) -> float:
        return rows.measure(load_base(path, compute=run.config.compute, mapped=True).model).loss

    original_loss = loss(plan.original.path) if plan.original else None
    held_out = HeldOut(before.loss, beside.loss, loss(written), len(rows.documents), before.tokens, compute)
    return held_out, original_loss
