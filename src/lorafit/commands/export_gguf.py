"""``lorafit export --format gguf``: a model as one GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.commands.console import readable_bytes
from lorafit.commands.export_request import Request, check_free, checked_tolerance, naming_full_disks
from lorafit.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from lorafit.exporting.gguf_certificate import GGUFCertificate

_AS_IN_GGUF = {"fp32": "f32", "fp16": "f16"}


def write(request: Request) -> GGUFCertificate:
    """Write the file and its certificate.

    Raises:
        ConfigError: It cannot be written so.
        LorafitError: As ``lorafit.exporting.gguf``.
    """
    if request.target.suffix.lower() != ".gguf":
        raise ConfigError(f"{request.output}: a GGUF file's name must end in .gguf")
    tolerance = checked_tolerance(request)

    from lorafit.containers.gguf import GGUFFile
    from lorafit.errors import LorafitError

    def is_export(path: Path) -> bool:
        try:
            return "lorafit.source.sha256" in GGUFFile.open(path).metadata
        except LorafitError:
            return False

    check_free(request, directory=False, mine=is_export)

    from lorafit.containers.atomic import replacing
    from lorafit.data.readers import read_examples
    from lorafit.exporting.gguf import export_gguf
    from lorafit.exporting.source import open_model
    from lorafit.merging.run import DEFAULT_TOLERANCE

    wanted = request.dtype or "f32"
    examples = read_examples(request.eval_data) if request.eval_data else []
    model = open_model(request.model)
    if not request.eval_data and model.run:
        examples = list(model.run.held_out(model.base.tokenizer).examples)
    if tolerance is not None and not examples:
        raise ConfigError("--certificate-tolerance has no effect without --eval-data; give rows to measure the loss on")
    if request.target.exists() and model.base.path.is_file() and request.target.samefile(model.base.path):
        raise MergeError(f"{request.output} is the model that is exported; choose another name")
    with naming_full_disks(request), replacing(request.proof) as proof, replacing(request.target) as written:
        certificate = export_gguf(
            model,
            written,
            _AS_IN_GGUF.get(wanted, wanted),  # type: ignore[arg-type]
            name=request.target.name,
            examples=examples,
            tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
            say=request.console.print,
        )
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def show(request: Request, certificate: GGUFCertificate) -> None:
    """Write the certificate for people."""
    from lorafit.exporting.gguf_certificate import InEngine, Losses

    weights, held_out, engine = certificate.weights, certificate.held_out, certificate.llamacpp
    counts = ", ".join(f"{count} {name}" for name, count in weights.formats.items())
    facts = {"weights": f"{weights.parameters:,}; {counts}"}
    if weights.relative_errors:
        furthest = max(weights.relative_errors, key=weights.relative_errors.__getitem__)
        facts["rounded"] = (
            f"{len(weights.relative_errors)} tensors, by {weights.relative_errors[furthest]:.2%} at most ({furthest}); "
            f"{weights.bit_identical} are the model's to the last bit"
        )
    else:
        facts["rounded"] = f"nothing: all {weights.bit_identical} tensors are the model's to the last bit"
        if certificate.type in ("f16", "bf16"):
            facts["rounded"] = f"once, to {certificate.type}; each of {weights.bit_identical} tensors is exactly that"
    if weights.fallbacks:
        kinds = Counter(weights.fallbacks.values())
        facts["fallbacks"] = (
            f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}: their rows are no whole number of blocks"
        )
    if certificate.second_quantization:
        facts["second time"] = f"quantised before, in {certificate.second_quantization}"
    if certificate.tokenizer_differences:
        facts["tokens"] = (
            f"llama.cpp cuts {', '.join(map(repr, certificate.tokenizer_differences))} otherwise than transformers"
        )
    if isinstance(held_out, Losses):
        facts["loss in lorafit"] = (
            f"{held_out.source_loss:.4f} for the model, {held_out.written_loss:.4f} for the file "
            f"({held_out.tokens:,} answer tokens)"
        )
        if held_out.tokenised_otherwise:
            facts["loss in lorafit"] += f"; {held_out.tokenised_otherwise} rows have other tokens in the file"
    else:
        facts["loss in lorafit"] = f"not measured: {held_out.not_measured}"
    if not isinstance(engine, InEngine):
        facts["llama.cpp"] = f"not measured: {engine.not_measured}"
    else:
        facts["llama.cpp"] = f"loads the file and runs it (xllamacpp {engine.version})"
        if engine.written_loss is not None:
            before = "" if engine.source_loss is None else f"{engine.source_loss:.3f} for the model, "
            facts["loss in llama.cpp"] = f"{before}{engine.written_loss:.3f} for the file ({engine.tokens:,} tokens)"
    facts["origin"] = f"{certificate.source.name}, SHA-256 {certificate.source.sha256}"
    if certificate.base:
        facts["base"] = f"{certificate.base.name}, SHA-256 {certificate.base.sha256}"
    request.console.fields(f"Certificate of {certificate.output.name}", facts)
    request.console.fields(
        "Files",
        {"model": f"{request.output} ({readable_bytes(certificate.output.size)})", "certificate": str(request.proof)},
    )
