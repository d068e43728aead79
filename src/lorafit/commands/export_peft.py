"""``lorafit export --format peft``: an adapter as a directory of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.commands.console import readable_bytes
from lorafit.commands.export_request import Request, check_free, naming_full_disks
from lorafit.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from lorafit.exporting.peft import PeftCertificate


def write(request: Request) -> PeftCertificate:
    """Write the directory and its certificate."""
    source, target = Path(request.model), request.target
    if not any((place / "adapter_config.json").is_file() for place in (source, source / "adapter")):
        raise ConfigError(f"{request.model} is no run or adapter, and --format peft writes the adapter of one")
    if source.resolve().is_relative_to(target.resolve()):
        raise MergeError(f"{request.output} holds the adapter that is exported; choose another directory")
    check_free(request, directory=True, mine=lambda path: (path / "adapter_config.json").is_file())

    from lorafit.containers.atomic import replacing, replacing_directory
    from lorafit.exporting.peft import export_peft

    with naming_full_disks(request), replacing(request.proof) as proof, replacing_directory(target) as written:
        certificate = export_peft(source, written, name=target.name, say=request.console.print)
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def show(request: Request, certificate: PeftCertificate) -> None:
    """Show what was proved and measured."""
    from lorafit.exporting.beside import BesideLoss

    facts = {"adapter": f"{certificate.parameters:,} numbers in {certificate.tensors} tensors, as they were trained"}
    if certificate.differs_by:
        facts["differs by"] = "; ".join(certificate.differs_by)
    held_out = certificate.held_out
    if isinstance(held_out, BesideLoss):
        facts["loss in lorafit"] = (
            f"{held_out.run_loss:.4f} for the run and {held_out.file_loss:.4f} for the directory "
            f"({held_out.tokens:,} held-out answer tokens, {held_out.compute})"
        )
    else:
        facts["loss in lorafit"] = f"not measured: {held_out.not_measured}"
    request.console.fields(f"Certificate of {certificate.output}", facts)
    size = sum((request.target / file).stat().st_size for file in certificate.files)
    files = {"adapter": f"{request.output} ({readable_bytes(size)})", "certificate": str(request.proof)}
    request.console.fields("Files", files)
