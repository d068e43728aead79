"""An adapter as a directory of PEFT alone, beside the run that it was taken from.

A run's own adapter is one already. What is left behind here is what only lorafit reads: offsets of QA-LoRA, whose
adapter becomes the ordinary LoRA that it is stored as. Foreign forms, such as pickled tensors or older names, become
those that PEFT writes today. The directory is read again and measured on the rows that the run held out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.adapters import load_adapter, save_adapter
from lorafit.adapters.foreign import read_targets
from lorafit.adapters.names import target_fields
from lorafit.adapters.parts import parts
from lorafit.config import LoRA, QALoRA
from lorafit.containers.atomic import fingerprint, write_text
from lorafit.errors import MergeError
from lorafit.exporting.beside import BesideLoss, differences
from lorafit.merging.engine import NO_ROWS, NotMeasured
from lorafit.merging.run import Run, detect
from lorafit.models.base import Base
from lorafit.training.report import command_line

CARD_FILE = "README.md"


@dataclass(frozen=True)
class PeftCertificate:
    """What is known about a directory for PEFT.

    Attributes:
        lorafit: Version that wrote it.
        source: Name of the run or adapter.
        method: The method that it was trained with.
        base: Name of what it was trained on.
        base_sha256: Its hash.
        output: Name of the directory.
        files: Name of each file -> its hash.
        tensors: How many there are.
        parameters: How many numbers they have.
        differs_by: What lies between the trained model and this adapter beside its base; empty if nothing does.
        held_out: Loss in lorafit.
    """

    lorafit: str
    source: str
    method: str
    base: str
    base_sha256: str
    output: str
    files: dict[str, str]
    tensors: int
    parameters: int
    differs_by: list[str]
    held_out: BesideLoss | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the directory."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def export_peft(
    source: str | Path, directory: Path, *, name: str, say: Callable[[str], None] = lambda text: None
) -> PeftCertificate:
    """Write an adapter, then read it again and measure it; the caller makes the directory appear whole.

    Args:
        source: A run, or the directory of an adapter.
        directory: An empty directory.
        name: What it will be called.
        say: Is told what is going on.

    Raises:
        MergeError: What was written is not what should have been.
        LorafitError: The adapter or its base cannot be loaded.
    """
    run = detect(source)
    base = run.load()
    config, exact = run.record.config, True
    if isinstance(config, QALoRA):
        targets = read_targets(target_fields(base.model))
        config, exact = LoRA(rank=config.rank, alpha=config.alpha, targets=targets), False
    save_adapter(base.model, directory, replace(run.record, config=config))
    tensors = [part.get() for part in parts(base.model).values()]
    held_out = _compare(run, base, directory, say)
    if exact and isinstance(held_out, BesideLoss) and held_out.run_loss != held_out.file_loss:
        raise MergeError(
            f"{name} is not kept: its loss is {held_out.file_loss} and that of the run {held_out.run_loss}, with the "
            "same numbers; check the disk"
        )
    certificate = PeftCertificate(
        lorafit=__version__,
        source=run.name,
        method=run.record.config.method,
        base=base.path.name,
        base_sha256=fingerprint(base.path),
        output=name,
        files={},
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        differs_by=differences(base, "F32"),
        held_out=held_out,
    )
    write_text(directory / CARD_FILE, "\n".join(_card(run, base, config, certificate)))
    base.check_unchanged()
    return replace(certificate, files={file.name: fingerprint(file) for file in sorted(directory.iterdir())})


def _compare(run: Run, base: Base, directory: Path, say: Callable[[str], None]) -> BesideLoss | NotMeasured:
    """The loss of the run and that of the directory beside a base that is loaded anew, if there are rows to measure."""
    again = run.load_base(run.config.compute)
    load_adapter(again.model, directory)
    rows = run.held_out(base.tokenizer)
    if not rows:
        return NO_ROWS
    say(f"measuring run and directory on {len(rows.examples)} held-out rows")
    of_run, of_directory = rows.measure(base.model), rows.measure(again.model)
    compute = str(base.compute).removeprefix("torch.")
    return BesideLoss(of_run.loss, of_directory.loss, len(rows.documents), of_run.tokens, compute)


def _card(run: Run, base: Base, config: LoRA, certificate: PeftCertificate) -> Sequence[str]:
    kind = "DoRA" if config.dora else "LoRA"
    size, by = f"{certificate.parameters:,} parameters", certificate.method
    quantized = [f"| quantised to | {base.quantize}, while it is loaded |"] if base.quantize else []
    lines = [
        *("---", "library_name: peft", "tags: [lora, lorafit]", "---", "", f"# Adapter: {certificate.source}", ""),
        *(f"{kind} of rank {config.rank}, {size}, trained with lorafit by {by}.", ""),
        *("| base | |", "| --- | --- |", f"| model | {certificate.base} |", f"| SHA-256 | {certificate.base_sha256} |"),
        *(f"| licence | {base.licence} |", *quantized, ""),
        *("```python", "from peft import PeftModel", ""),
        *(f'model = PeftModel.from_pretrained(base_model, "{certificate.output}")', "```", ""),
    ]
    if run.path != run.adapter:
        lines += ["Trained by", "", "```", command_line(run.config), "```", ""]
    if isinstance(certificate.held_out, BesideLoss):
        measured = certificate.held_out
        lines += [
            f"Loss on {measured.tokens:,} answer tokens that were held out: {measured.file_loss:.4f} "
            f"(the run: {measured.run_loss:.4f}).",
            "",
        ]
    if certificate.differs_by:
        lines += [f"Differs from the trained model by: {'; '.join(certificate.differs_by)}.", ""]
    return lines
