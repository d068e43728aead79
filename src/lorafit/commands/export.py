"""``lorafit export``: a model in a form that other tools read.

Each format is an entry of ``_FORMATS``: a function that writes it, one that shows what was proved, and the options that
it takes; a larger one has a module for them, such as ``export_gguf``. An option that a format does not take is refused,
so none is without effect.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from lorafit.commands import export_gguf, export_peft
from lorafit.commands.console import Console, readable_bytes
from lorafit.commands.export_request import Certificate, ExportDtype, Request, check_free, naming_full_disks
from lorafit.config import GGUFType, Requantize
from lorafit.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from lorafit.exporting.beside import BesideCertificate
    from lorafit.exporting.ollama import OllamaCertificate
    from lorafit.exporting.safetensors import ExportCertificate

ExportFormat = Literal["safetensors", "gguf", "gguf-lora", "peft", "ollama"]


@dataclass(frozen=True)
class _Format:
    """A format.

    Attributes:
        write: Writes the output and its certificate.
        show: Shows the certificate to people.
        options: Options of `Request` that it takes -> their values, or None for any.
    """

    write: Callable[[Request], Certificate]
    show: Callable[[Request, Any], None]
    options: dict[str, tuple[str, ...] | None]


def export(
    model: str,
    output: str,
    *,
    format: ExportFormat = "safetensors",
    dtype: ExportDtype | None = None,
    requantize: Requantize | None = None,
    eval_data: str | None = None,
    certificate_tolerance: float | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Certificate:
    """Writes a model in a format of other tools, and OUTPUT.certificate.json.

    Both appear whole, and only after what was written was compared with the model.

    Args:
        model: A .gguf file, ``smollm2-135m``, or a directory; for gguf-lora and peft, a run or the directory of an
            adapter; for ollama, a run or a .gguf file.
        output: The file or directory to write.
        format: Of the output.
        dtype: Type of the weights; fp32 (f32 in GGUF) if missing, which loses nothing.
        requantize: For a run that is merged, as for `lorafit.merge`.
        eval_data: For gguf: rows to measure the loss on, of the model and of the file.
        certificate_tolerance: For gguf: by how much the file's may be larger, in nats per token; 0.05 if missing.
        overwrite: Replace the output if an earlier export wrote it.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What was proved and measured.

    Raises:
        ConfigError: The format does not exist, or has no such option; or this model cannot be exported to it.
        OutputExistsError: The output exists, and ``overwrite`` is not set or it is no export.
        MergeError: What was written is not what should have been.
        LorafitError: The model cannot be loaded.
    """
    console = console or Console(quiet=True)
    request = Request(model, output, dtype, requantize, overwrite, console, eval_data, certificate_tolerance)
    return _checked(format, request).write(request)


def _checked(name: str, request: Request) -> _Format:
    """The format, if it takes the options."""
    if name not in _FORMATS:
        raise ConfigError(f"export writes {', '.join(_FORMATS)}, not {name}")
    for option in ("dtype", "requantize", "eval_data", "certificate_tolerance"):
        value = getattr(request, option)
        if value is None:
            continue
        shown = f"--{option.replace('_', '-')}"
        if option not in _FORMATS[name].options:
            raise ConfigError(f"{shown} has no effect on --format {name}; leave it out")
        possible = _FORMATS[name].options[option]
        if possible and value not in possible:
            raise ConfigError(f"--format {name} has {shown} {', '.join(possible)}, not {value}")
    return _FORMATS[name]


def _write_safetensors(request: Request) -> ExportCertificate:
    target, model = request.target, request.model
    if (Path(model) / "adapter").is_dir():
        raise ConfigError(f"{model} is a run, and export takes a base without an adapter; give the base")

    import json

    def is_export(path: Path) -> bool:
        try:
            return "lorafit_origin" in json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False

    check_free(request, directory=True, mine=is_export)

    import torch

    from lorafit.containers.atomic import replacing, replacing_directory
    from lorafit.exporting.safetensors import export_safetensors
    from lorafit.models.load import is_full_precision, load_base

    if Path(model).is_dir() and is_full_precision(model):
        raise ConfigError(f"{model} holds unpacked safetensors already, so there is nothing to export")
    base = load_base(model, compute="fp32")
    if base.path.resolve().is_relative_to(target.resolve()):
        raise MergeError(f"{request.output} holds the model that is exported; choose another directory")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[request.dtype or "fp32"]
    with naming_full_disks(request), replacing(request.proof) as proof, replacing_directory(target) as written:
        certificate = export_safetensors(base, written, dtype, name=target.name, say=request.console.print)
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _show_safetensors(request: Request, certificate: ExportCertificate) -> None:
    size = sum((request.target / file).stat().st_size for file in certificate.files)
    if certificate.bit_identical:
        said = "every weight is the one that the blocks stand for, to the last bit"
    else:
        said = f"rounded to {certificate.dtype}, by {certificate.largest_difference:.3g} at most"
    request.console.fields(
        f"Certificate of {certificate.output}",
        {
            "weights": f"{certificate.parameters:,} in {certificate.tensors} tensors; {said}",
            "origin": f"{certificate.source}, SHA-256 {certificate.source_sha256}",
        },
    )
    request.console.fields(
        "Files", {"model": f"{request.output} ({readable_bytes(size)})", "certificate": str(request.proof)}
    )


def _write_gguf_lora(request: Request) -> BesideCertificate:
    source, target = Path(request.model), request.target
    if target.suffix.lower() != ".gguf":
        raise ConfigError(f"{request.output}: a GGUF-LoRA is one file, so the name must end in .gguf")
    if not any((place / "adapter_config.json").is_file() for place in (source, source / "adapter")):
        raise ConfigError(f"{request.model} is no run or adapter, and --format gguf-lora writes the adapter of one")

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
        certificate = export_gguf_lora(source, written, dtype, name=target.name, say=request.console.print)
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _show_gguf_lora(request: Request, certificate: BesideCertificate) -> None:
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


def _write_ollama(request: Request) -> OllamaCertificate:
    source, target = Path(request.model), request.target
    is_run = (source / "adapter").is_dir()
    if source.is_dir() and not is_run:
        raise ConfigError(f"{request.model} is no GGUF file and no run; export it with --format gguf first")
    if request.requantize and not is_run:
        raise ConfigError(f"--requantize has no effect on {request.model}, which has no adapter to merge; leave it out")
    check_free(request, directory=True, mine=lambda path: (path / "Modelfile").is_file())

    import json
    import shutil

    from lorafit.containers.atomic import replacing, replacing_directory
    from lorafit.exporting import ollama
    from lorafit.models.load import resolve

    path = None if is_run else resolve(request.model)
    if path is not None and path.resolve().is_relative_to(target.resolve()):
        raise MergeError(f"{request.output} holds the model that is exported; choose another directory")
    with naming_full_disks(request), replacing(request.proof) as proof, replacing_directory(target) as written:
        merged: dict[str, Any] | None = None
        weights = written / ollama.WEIGHTS
        if path is None:
            from lorafit.commands.merge import merge

            merge(request.model, str(weights), requantize=request.requantize, console=request.console)
            of_merge = Path(f"{weights}.certificate.json")
            merged = json.loads(of_merge.read_text(encoding="utf-8"))
            of_merge.unlink()
        else:
            shutil.copyfile(path, weights)
        name = source.resolve().name if path is None else path.name
        certificate = ollama.write_modelfile(written, name, merged)
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _show_ollama(request: Request, certificate: OllamaCertificate) -> None:
    prompts = certificate.prompts
    facts = {"prompts": "written as the model's chat template writes them, on conversations of 1 to 5 messages"}
    if prompts.differs_by:
        facts["differs by"] = "; ".join(prompts.differs_by)
    if prompts.system:
        facts["system message"] = prompts.system
    if not prompts.system_has_effect:
        facts["no effect"] = "system messages: the chat template leaves them out"
    request.console.fields(f"Certificate of {request.target.name}", {**facts, "stops": " ".join(prompts.stops)})
    modelfile = shlex.quote(str(request.target / "Modelfile"))
    request.console.fields(
        "Files",
        {
            "model": f"{request.target / certificate.model.name} ({readable_bytes(certificate.model.size)})",
            "certificate": str(request.proof),
            "Ollama": f"ollama create {shlex.quote(request.target.name)} -f {modelfile}",
        },
    )


_FORMATS: dict[str, _Format] = {
    "safetensors": _Format(_write_safetensors, _show_safetensors, {"dtype": ("fp32", "bf16", "fp16")}),
    "gguf": _Format(
        export_gguf.write,
        export_gguf.show,
        {"dtype": ("fp32", "fp16", *get_args(GGUFType)), "eval_data": None, "certificate_tolerance": None},
    ),
    "gguf-lora": _Format(_write_gguf_lora, _show_gguf_lora, {"dtype": ("fp32", "fp16")}),
    "peft": _Format(export_peft.write, export_peft.show, {}),
    "ollama": _Format(_write_ollama, _show_ollama, {"requantize": None}),
}


def export_command(
    model: str,
    output: str,
    /,
    *,
    format: ExportFormat,
    dtype: Annotated[ExportDtype | None, Parameter(name=("--dtype", "--type"))] = None,
    requantize: Requantize | None = None,
    eval_data: str | None = None,
    certificate_tolerance: float | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write a model in a form that other tools read, with a certificate of what it is.

    Args:
        model: A .gguf file, smollm2-135m, or a directory (for safetensors, one that bitsandbytes quantised); for
            gguf-lora and peft, a run or the directory of an adapter; for ollama, a run or a .gguf file.
        output: The file or directory to write; a certificate is written beside it as OUTPUT.certificate.json.
        format: Of the output: safetensors, a directory that transformers loads; gguf, a file for llama.cpp, Ollama and
            lorafit itself; gguf-lora, an adapter for llama.cpp; peft, an adapter for PEFT; ollama, a directory with a
            GGUF file, into which a run is merged, and its Modelfile.
        dtype: Type of the weights; fp32 (f32) loses nothing, bf16 and fp16 (f16) take half the space. For gguf also
            block formats, and the mixes q4_k_m and q5_k_m. [default: fp32]
        requantize: For a run that is exported to ollama: as for merge.
        eval_data: For gguf: rows to measure the loss on, of the model and of the file, in a .jsonl file as for
            training.
        certificate_tolerance: For gguf: by how much the file's loss may be larger, in nats per token, before it is
            refused. [default: 0.05]
        overwrite: Replace the output if an earlier export wrote it.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    request = Request(model, output, dtype, requantize, overwrite, console, eval_data, certificate_tolerance)
    chosen = _checked(format, request)
    certificate = chosen.write(request)
    chosen.show(request, certificate)
    console.result(certificate.as_dict())
