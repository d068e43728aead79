"""``lorafit export``: a model in a form that other tools read.

Each format is an entry of ``_FORMATS``: a function that writes it, one that shows what was proved, and the options that
it takes; a larger one has a module for them, such as ``export_gguf``. An option that a format does not take is refused,
so none is without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from lorafit.commands import export_gguf, export_gguf_lora, export_ollama, export_peft
from lorafit.commands.console import Console, readable_bytes
from lorafit.commands.export_request import Certificate, ExportDtype, Request, check_free, naming_full_disks
from lorafit.config import GGUFType, Requantize
from lorafit.errors import ConfigError, MergeError

if TYPE_CHECKING:
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
    adapter: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Certificate:
    """Writes a model in a format of other tools, and OUTPUT.certificate.json.

    Both appear whole, and only after what was written was compared with the model.

    Args:
        model: A .gguf file, ``smollm2-135m``, or a directory; for gguf also a run or the directory of an adapter; for
            gguf-lora and peft, only these; for ollama, a run or a model.
        output: The file or directory to write.
        format: Of the output.
        dtype: Type of the weights; fp32 (f32 in GGUF) if missing, which loses nothing.
        requantize: For a run that is merged, as for `lorafit.merge`.
        eval_data: For gguf, and ollama with ``dtype``: rows to measure the loss on, of the model and of the file.
        certificate_tolerance: By how much the loss of what is written may be larger, in nats per token; 0.05 if
            missing.
        adapter: For gguf-lora: the adapter, if ``model`` is its base and not the adapter itself.
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
    request = Request(model, output, dtype, requantize, overwrite, console, eval_data, certificate_tolerance, adapter)
    return _checked(format, request).write(request)


def _checked(name: str, request: Request) -> _Format:
    """The format, if it takes the options."""
    if name not in _FORMATS:
        raise ConfigError(f"export writes {', '.join(_FORMATS)}, not {name}")
    for option in ("dtype", "requantize", "eval_data", "certificate_tolerance", "adapter"):
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


_FORMATS: dict[str, _Format] = {
    "safetensors": _Format(_write_safetensors, _show_safetensors, {"dtype": ("fp32", "bf16", "fp16")}),
    "gguf": _Format(
        export_gguf.write,
        export_gguf.show,
        {"dtype": ("fp32", "fp16", *get_args(GGUFType)), "eval_data": None, "certificate_tolerance": None},
    ),
    "gguf-lora": _Format(
        export_gguf_lora.write,
        export_gguf_lora.show,
        {"dtype": ("fp32", "fp16"), "certificate_tolerance": None, "adapter": None},
    ),
    "peft": _Format(export_peft.write, export_peft.show, {}),
    "ollama": _Format(
        export_ollama.write,
        export_ollama.show,
        {
            **{"dtype": ("fp32", "fp16", *get_args(GGUFType)), "requantize": None},
            **{"eval_data": None, "certificate_tolerance": None},
        },
    ),
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
    adapter: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write a model in a form that other tools read, with a certificate of what it is.

    Args:
        model: A .gguf file, smollm2-135m, or a directory (for safetensors, one that bitsandbytes quantised); for gguf
            also a run or the directory of an adapter; for gguf-lora and peft, only these; for ollama, a run or a model.
        output: The file or directory to write; a certificate is written beside it as OUTPUT.certificate.json.
        format: Of the output: safetensors, a directory that transformers loads; gguf, a file for llama.cpp, Ollama and
            lorafit itself; gguf-lora, an adapter for llama.cpp; peft, an adapter for PEFT; ollama, a directory with a
            GGUF file, into which a run is merged, and its Modelfile.
        dtype: Type of the weights; fp32 (f32) loses nothing, bf16 and fp16 (f16) take half the space. For gguf
            and ollama also block formats, and the mixes q4_k_m and q5_k_m. [default: fp32]
        requantize: For ollama and a run on a GGUF file: as for merge.
        eval_data: For gguf, and ollama with --dtype: rows to measure the loss on, of the model and of the file, in a
            .jsonl file as for training; for a run, its held-out rows if missing.
        certificate_tolerance: By how much the loss of what is written may be larger than the model's, in nats per
            token, before it is refused. [default: 0.05]
        adapter: For gguf-lora: an adapter whose base is MODEL, for one that does not say where its base is.
        overwrite: Replace the output if an earlier export wrote it.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    request = Request(model, output, dtype, requantize, overwrite, console, eval_data, certificate_tolerance, adapter)
    chosen = _checked(format, request)
    certificate = chosen.write(request)
    chosen.show(request, certificate)
    console.result(certificate.as_dict())
