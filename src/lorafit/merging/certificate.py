"""The certificate: what is known about a merged file, and how.

Everything is proved on the written file, opened again:

* *Bytes.* Both files are read side by side. All metadata are the base's, byte for byte, and so is every tensor that was
  not trained. A trained one differs inside offsets only, each of which is the stored m'; where its format has none, it
  is the base's tensor promoted as for training, and differs from that inside offsets only.
* *Weights.* The file is loaded as any other, and each adapted layer unpacks to the very bits that the run computes
  with. This sees what bytes alone cannot: whether each row went to its place.
* *Loss.* lorafit's loss on the held-out rows is the same float64 for the run and for the file.
* *llama.cpp.* The engine that the file is made for loads it, and says how likely it finds held-out answers and what it
  answers itself, before and after (``engine.py``).

Tensors that were rounded anew are no part of these claims. For them the certificate says that they are not exact, how
far rounding moved the weights, and the losses of base, run and file: the run's is what is had by shipping the adapter
beside the base.

A claim that turns out false is an error, and then neither file nor certificate appears. A measurement that could not be
made is in the certificate as well, with the reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit import __version__
from lorafit.errors import MergeError
from lorafit.evaluation.llamacpp import available
from lorafit.merging.engine import NO_ROWS, InLlamaCpp, NotMeasured, run_in_llamacpp
from lorafit.merging.exact import OffsetChange
from lorafit.merging.plan import Plan
from lorafit.merging.requantize import RoundedChange, merged_matrix
from lorafit.merging.run import HeldOut, HeldOutRows, check_loss
from lorafit.merging.verify import verify
from lorafit.models.load import load_base
from lorafit.models.saving import squared_error
from lorafit.modules import AdapterModule, PackedEmbedding, PackedLinear, QALoRALinear, adapters_disabled
from lorafit.modules.experts import ExpertStack


@dataclass(frozen=True)
class FileRecord:
    """Which file is meant.

    Attributes:
        name: Its name when the certificate was made.
        sha256: Hash of its content.
        size: Bytes.
    """

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Weights:
    """The packed weights, against those trained; tensors in ``requantized`` are not counted here.

    Attributes:
        bit_identical: Integers and scales are the base's, promoted where ``promoted`` says so, and offsets the run's;
            all other tensors and all metadata are the base's. False if no tensor was merged so.
        tensors: Tensors with new offsets.
        offsets: Offsets that were written.
        bytes_changed: Bytes of offsets that differ from the base's, promoted where need be; no other bytes do.
        promoted: "FORMAT to FORMAT" -> how many of the tensors were given offsets so; they are larger than in the base.
        untouched: Tensors that are the base's.
        rounded_otherwise: Offsets that this machine, computing them anew from A and B, rounds to a neighbour. The
            stored ones were written, so this only says how far another merge would be off.
    """

    bit_identical: bool
    tensors: int
    offsets: int
    bytes_changed: int
    promoted: dict[str, int]
    untouched: int
    rounded_otherwise: int


@dataclass(frozen=True)
class Requantized:
    """Tensors to which the update was added, and which were rounded anew.

    Attributes:
        exact: They are not what was trained.
        tensors: How many.
        formats: "FORMAT to FORMAT" -> how many of them went from one to the other.
        relative_error: How far rounding moved their weights: root mean square, relative to that of the weights.
        dithered: How many of them keep the grid of the base, onto which the update was rounded at random. Their error
            is larger than it could be, but the update is not lost in it.
    """

    exact: bool
    tensors: int
    formats: dict[str, int]
    relative_error: float
    dithered: int


@dataclass(frozen=True)
class Certificate:
    """What is known about a merged file.

    Attributes:
        lorafit: Version that merged.
        run: Name of the run's directory.
        method: The method that it was trained with.
        base: The file that it was trained on.
        merged: The file that was written.
        weights: Proof of the packed weights.
        requantized: What is not exact; None if all is.
        held_out: Loss in lorafit.
        llamacpp: The file as its users run it.
    """

    lorafit: str
    run: str
    method: str
    base: FileRecord
    merged: FileRecord
    weights: Weights
    requantized: Requantized | None
    held_out: HeldOut | NotMeasured
    llamacpp: InLlamaCpp | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the merged file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def certify(
    plan: Plan, written: str | Path, name: str, *, say: Callable[[str], None] = lambda text: None
) -> Certificate:
    """Prove that a written file is the model that was trained, and measure it.

    Args:
        plan: What should have been written.
        written: Where the file lies now.
        name: What it will be called.
        say: Is told what is going on.

    Raises:
        MergeError: The file is not what it should be, or llama.cpp cannot run it.
    """
    written = Path(written)
    say("comparing every byte with the base")
    comparison = verify(plan, written)
    rows = plan.run.held_out(plan.base.tokenizer)
    exact = [change for change in plan.changes if isinstance(change, OffsetChange)]
    if rows:
        say(f"measuring run and merged file on {len(rows.documents)} held-out rows")
    merged = load_base(written, compute=plan.run.config.compute).model
    _check_weights(plan, merged, exact, name)
    rounded = _measure_rounding(plan, merged)
    held_out = _compare_losses(plan, merged, rows, name)
    if available():
        say("running base and merged file in llama.cpp")
    return Certificate(
        lorafit=__version__,
        run=plan.run.name,
        method=plan.run.record.config.method,
        base=FileRecord(plan.base.path.name, plan.base_sha256, comparison.base_size),
        merged=FileRecord(name, comparison.sha256, comparison.size),
        weights=Weights(
            bit_identical=bool(exact),
            tensors=len(exact),
            offsets=sum(change.offsets.numel() for change in exact),
            bytes_changed=comparison.bytes_changed,
            promoted=_count_formats([change for change in exact if change.format != change.tensor.format]),
            untouched=len(plan.file.tensors) - len(plan.changes),
            rounded_otherwise=plan.rounded_otherwise,
        ),
        requantized=rounded,
        held_out=held_out,
        llamacpp=run_in_llamacpp(plan.base.path, written, name, rows.examples, rows.documents),
    )


def _count_formats(changes: Sequence[OffsetChange | RoundedChange]) -> dict[str, int]:
    return dict(Counter(f"{change.tensor.format} to {change.format}" for change in changes))


def _check_weights(plan: Plan, merged: PreTrainedModel, changes: Sequence[OffsetChange], name: str) -> None:
    """The layers with new offsets unpack to the bits that the run computes with."""
    for change in changes:
        trained, loaded = plan.base.model.get_submodule(change.module), merged.get_submodule(change.module)
        assert isinstance(trained, QALoRALinear) and isinstance(loaded, PackedLinear)
        expected = trained.trained.dense(torch.float32, trained.merged_offsets()).clone()
        found = loaded.packed.dense(torch.float32)
        if not torch.equal(expected.view(torch.int32), found.view(torch.int32)):
            raise MergeError(f"{name} is not kept: the weights of {change.module} are not those that were trained")


def _measure_rounding(plan: Plan, merged: PreTrainedModel) -> Requantized | None:
    changes = [change for change in plan.changes if isinstance(change, RoundedChange)]
    if not changes:
        return None
    error = size = 0.0
    for name in dict.fromkeys(change.module for change in changes):
        trained = plan.base.model.get_submodule(name)
        assert isinstance(trained, AdapterModule)
        for number, found in enumerate(_matrices(merged.get_submodule(name))):
            # Both would be unpacked into the same buffer.
            wanted = merged_matrix(trained, number)
            moved, whole = squared_error(found(), wanted)
            error, size = error + moved, size + whole
    relative = math.sqrt(error / size) if size else 0.0
    return Requantized(
        False, len(changes), _count_formats(changes), relative, sum(change.dithered for change in changes)
    )


def _matrices(layer: torch.nn.Module) -> list[Callable[[], Tensor]]:
    """What unpacks the matrix of a layer, or those of its experts: float32 [out_dim, in_dim]."""
    if isinstance(layer, ExpertStack):
        return [partial(layer.dense, expert, torch.float32) for expert in range(layer.experts)]
    assert isinstance(layer, PackedLinear | PackedEmbedding)
    return [partial(layer.packed.dense, torch.float32)]


def _compare_losses(plan: Plan, merged: PreTrainedModel, rows: HeldOutRows, name: str) -> HeldOut | NotMeasured:
    """The loss of the file is that of the run to the last bit, or near it where tensors were rounded anew."""
    if not rows:
        return NO_ROWS
    model = plan.base.model
    with adapters_disabled(model):
        before = rows.measure(model)
    of_run, of_file = rows.measure(model), rows.measure(merged)
    if plan.requantize is None and of_run.loss != of_file.loss:
        raise MergeError(f"{name} is not kept: its held-out loss is {of_file.loss!r}, that of the run {of_run.loss!r}")
    compute = str(plan.base.compute).removeprefix("torch.")
    held_out = HeldOut(before.loss, of_run.loss, of_file.loss, len(rows.documents), of_run.tokens, compute)
    check_loss(held_out, plan.tolerance, name, f"rounding to --requantize {plan.requantize}")
    return held_out
