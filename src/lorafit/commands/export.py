"""``lorafit export``: a packed model in a form that other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.commands.console import Console, readable_bytes
from lorafit.errors import ConfigError, MergeError, OutputExistsError

if TYPE_CHECKING:
    from lorafit.exporting.safetensors import ExportCertificate

ExportFormat = Literal["safetensors"]
ExportDtype = Literal["fp32", "bf16", "fp16"]


def export(
    model: str,
    output: str,
    *,
    format: ExportFormat = "safetensors",
    dtype: ExportDtype = "fp32",
    overwrite: bool = False,
    console: Console | None = None,
) -> ExportCertificate:
    """Unpacks a quantised model into a directory that transformers loads, and writes OUTPUT.certificate.json.

    Both appear whole, and only after what was written was compared with the blocks.

    Args:
        model: A .gguf file, ``smollm2-135m``, or a directory that bitsandbytes quantised.
        output: The directory to write.
        format: Of the output.
        dtype: Type of the weights; fp32 loses nothing.
        overwrite: Replace the output if an earlier export wrote it.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What was proved and measured.

    Raises:
        ConfigError: A run, or a directory that holds unpacked weights already.
        OutputExistsError: The output exists, and ``overwrite`` is not set or it is no export.
        MergeError: What was written is not what should have been.
        LorafitError: The model cannot be loaded.
    """
    if format != "safetensors" or dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"export writes safetensors in fp32, bf16 or fp16, not {format} in {dtype}")
    target, proof = Path(output), Path(f"{output}.certificate.json")
    if (Path(model) / "adapter").is_dir():
        raise ConfigError(f"{model} is a run, and export takes a base without an adapter; give the base")
    _check_free(target, proof, overwrite)

    import torch

    from lorafit.containers.atomic import replacing, replacing_directory
    from lorafit.exporting.safetensors import export_safetensors
    from lorafit.models.load import is_full_precision, load_base

    say = (console or Console(quiet=True)).print
    if Path(model).is_dir() and is_full_precision(model):
        raise ConfigError(f"{model} holds unpacked safetensors already, so there is nothing to export")
    base = load_base(model, compute="fp32")
    if base.path.resolve().is_relative_to(target.resolve()):
        raise MergeError(f"{output} holds the model that is exported; choose another directory")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        with replacing(proof) as proof_written, replacing_directory(target) as written:
            certificate = export_safetensors(base, written, types[dtype], name=target.name, say=say)
            proof_written.write_text(certificate.as_json(), encoding="utf-8")
    except OSError as error:
        # A full disk is noticed by a write, which does not know of which file.
        if error.filename is None:
            error.filename = output
        raise
    return certificate


def _check_free(target: Path, proof: Path, overwrite: bool) -> None:
    """Only an empty place is written to, or with ``overwrite`` what an earlier export left."""
    for path in (target, proof):
        if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
            raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise OutputExistsError(f"{target} is not what an export wrote, so it is not replaced; choose another name")
    if target.is_file() or proof.is_dir():
        raise OutputExistsError(f"{target if target.is_file() else proof} is in the way; choose another name")


def _is_export(path: Path) -> bool:
    try:
        return "lorafit_origin" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def export_command(
    model: str,
    output: str,
    /,
    *,
    format: ExportFormat,
    dtype: ExportDtype = "fp32",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Unpack a quantised model into a directory of safetensors that transformers loads.

    Args:
        model: A .gguf file, smollm2-135m, or a directory that bitsandbytes quantised.
        output: The directory to write; a certificate is written beside it as OUTPUT.certificate.json.
        format: Of the output: safetensors.
        dtype: Type of the weights; fp32 loses nothing, bf16 and fp16 take half the space.
        overwrite: Replace the output if an earlier export wrote it.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    certificate = export(model, output, format=format, dtype=dtype, overwrite=overwrite, console=console)
    size = sum((Path(output) / file).stat().st_size for file in certificate.files)
    if certificate.bit_identical:
        said = "every weight is the one that the blocks stand for, to the last bit"
    else:
        said = f"rounded to {certificate.dtype}, by {certificate.largest_difference:.3g} at most"
    console.fields(
        f"Certificate of {certificate.output}",
        {
            "weights": f"{certificate.parameters:,} in {certificate.tensors} tensors; {said}",
            "origin": f"{certificate.source}, SHA-256 {certificate.source_sha256}",
        },
    )
    console.fields(
        "Files", {"model": f"{output} ({readable_bytes(size)})", "certificate": f"{output}.certificate.json"}
    )
    console.result(certificate.as_dict())
