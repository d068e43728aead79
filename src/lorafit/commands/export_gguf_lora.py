"""``lorafit export --format gguf-lora``: an adapter for llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.commands.console import readable_bytes
from lorafit.commands.export_request import Request, check_free, checked_tolerance, naming_full_disks
from lorafit.errors import ConfigError

if TYPE_CHECKING:
    from lorafit.exporting.beside import BesideCertificate


def write(request: Request) -> BesideCertificate:
    """Write the file and its certificate."""
    source, target = Path(request.adapter or request.model), request.target
    if target.suffix.lower() != ".gguf":
        raise ConfigError(f"{request.output}: a GGUF-LoRA is one file, so the name must end in .gguf")
    if not any((place / "adapter_config.json").is_file() for place in (source, source / "adapter")):
        raise ConfigError(
            f"{source} is no run or adapter, and --format gguf-lora writes the adapter of one; give that, or its base "
            "and --adapter DIRECTORY"
        )
    tolerance = checked_tolerance(request)

    from lorafit.containers.gguf import GGUFFile
    from lorafit.errors import LorafitError

    def is_export(path: Path) -> bool:
        try:
            return GGUFFile.open(path).metadata.get("general.type") == "adapter"
        except LorafitError:
            return False

    check_free(request, directory=False, mine=is_export)

    from lorafit.containers.atomic import replacing
    from lorafit.exporting.beside import export_gguf_lora

    dtype = {"fp32": "F32", "fp16": "F16"}[request.dtype or "fp32"]
    with naming_full_disks(request), replacing(request.proof) as proof, replacing(target) as written:
        certificate = export_gguf_lora(
            source,
            written,
            dtype,
            base_model=request.model if request.adapter else None,
            name=target.name,
            tolerance=tolerance,
            say=request.console.print,
        )
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def show(request: Request, certificate: BesideCertificate) -> None:
    """Show what was proved and measured."""
    from lorafit.exporting.beside import BesideLoss
    from lorafit.merging.engine import Answers, InLlamaCpp

    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in certificate.ranks.items())
    facts = {"matrices": f"{ranks}; alpha {certificate.alpha:g}"}
    if certificate.folded:
        facts["scaling"] = f"multiplied into B for {certificate.folded}, where llama.cpp's alpha/rank is not theirs"
    facts["updates"] = f"off by {certificate.largest_difference:.2g} at most, relative to their size"
    if certificate.differs_by:
        facts["differs by"] = "; ".join(certificate.differs_by)
    held_out, engine = certificate.held_out, certificate.llamacpp
    if isinstance(held_out, BesideLoss):
        facts["loss in lorafit"] = (
            f"{held_out.run_loss:.4f} for the run and {held_out.file_loss:.4f} for base and file "
            f"({held_out.tokens:,} held-out answer tokens, {held_out.compute})"
        )
    else:
        facts["loss in lorafit"] = f"not measured: {held_out.not_measured}"
    answers = engine.answers if isinstance(engine, InLlamaCpp) else engine
    if isinstance(answers, Answers):
        facts["loss in llama.cpp"] = (
            f"{answers.base_loss:.3f} base, {answers.merged_loss:.3f} with the adapter ({answers.tokens:,} tokens of "
            f"{answers.rows} held-out answers; compare these with one another only)"
        )
    else:
        facts["loss in llama.cpp"] = f"not measured: {answers.not_measured}"
    request.console.fields(f"Certificate of {certificate.output.name}", facts)
    request.console.fields(
        "Files",
        {
            "adapter": f"{request.output} ({readable_bytes(certificate.output.size)})",
            "certificate": str(request.proof),
            "llama.cpp": f"llama-cli -m {certificate.base.name} --lora {shlex.quote(request.output)}",
        },
    )
