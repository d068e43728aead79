"""``lorafit export --format ollama``: a directory with a GGUF file and its Modelfile."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.commands import export_gguf
from lorafit.commands.console import readable_bytes
from lorafit.commands.export_request import Request, check_free, naming_full_disks
from lorafit.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from lorafit.exporting.ollama import OllamaCertificate


def write(request: Request) -> OllamaCertificate:
    """Write the directory and its certificate."""
    target = request.target
    check_free(request, directory=True, mine=lambda path: (path / "Modelfile").is_file())

    from lorafit.containers.atomic import replacing, replacing_directory
    from lorafit.exporting.ollama import WEIGHTS, write_modelfile
    from lorafit.models.load import resolve

    path = resolve(request.model)
    if path.resolve().is_relative_to(target.resolve()):
        raise MergeError(f"{request.output} holds the model that is exported; choose another directory")
    with naming_full_disks(request), replacing(request.proof) as proof, replacing_directory(target) as written:
        of_weights = _write_weights(request, path, written / WEIGHTS)
        certificate = write_modelfile(written, path.resolve().name, of_weights)
        proof.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _write_weights(request: Request, path: Path, weights: Path) -> dict[str, Any] | None:
    """Write the GGUF file: merged, made in a type, or copied; returns the certificate of the merge or export."""
    from lorafit.models.load import is_adapted

    merges = is_adapted(path) and request.dtype is None and _is_beside_a_file(path)
    if request.requantize and not merges:
        raise ConfigError(
            f"--requantize has no effect on {request.model}, "
            + ("which --dtype writes in a type" if request.dtype else "of which no GGUF file is merged")
            + "; leave it out"
        )
    if merges:
        from lorafit.commands.merge import merge

        if request.eval_data:
            raise ConfigError("--eval-data has no effect on a run that is merged: it has rows of its own; leave it out")
        merge(
            request.model,
            str(weights),
            requantize=request.requantize,
            certificate_tolerance=request.certificate_tolerance,
            console=request.console,
        )
    elif request.dtype or path.is_dir():
        export_gguf.write(replace(request, output=str(weights), overwrite=False))
    else:
        for option in ("eval_data", "certificate_tolerance"):
            if getattr(request, option) is not None:
                shown = option.replace("_", "-")
                raise ConfigError(f"--{shown} has no effect on {request.model}, which is copied as it is; leave it out")
        shutil.copyfile(path, weights)
        return None
    proof = Path(f"{weights}.certificate.json")
    certificate: dict[str, Any] = json.loads(proof.read_text(encoding="utf-8"))
    proof.unlink()
    return certificate


def _is_beside_a_file(run: Path) -> bool:
    """Whether an adapter was trained beside a GGUF file as it is, into which it can be merged."""
    from lorafit.adapters import read_record
    from lorafit.models.load import resolve

    record = read_record(run / "adapter" if (run / "adapter").is_dir() else run)
    return record.quantize is None and resolve(record.base).is_file()


def show(request: Request, certificate: OllamaCertificate) -> None:
    """Show what was proved and measured."""
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
