"""``lorafit merge``: the tuned model as one GGUF file or directory, and the proof of what it is."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.commands.certificates import show_directory, show_file
from lorafit.commands.console import Console, readable_bytes
from lorafit.config import Requantize
from lorafit.errors import MergeError, OutputExistsError

if TYPE_CHECKING:
    from lorafit.merging import Certificate, DirectoryCertificate

MergeDtype = Literal["fp32", "bf16", "fp16"]

_OTHER_FILES = (".safetensors", ".bin", ".pt", ".pth")  # of weights, which nobody means as the name of a directory


def merge(
    run: str,
    output: str,
    *,
    base: str | None = None,
    dtype: MergeDtype | None = None,
    onto: str | None = None,
    requantize: Requantize | None = None,
    certificate_tolerance: float | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Certificate | DirectoryCertificate:
    """Writes the tuned model of a run, and its certificate as OUTPUT.certificate.json.

    Both appear whole, and only after everything in the certificate was proved on what was written.

    Args:
        run: Directory of a run, or of an adapter.
        output: The GGUF file to write, or the directory: safetensors that transformers loads.
        base: Where the base is, if it is not where the run or adapter says.
        dtype: Type of the weights in a directory; fp32 if missing, which rounds nothing.
        onto: For a directory, the original of a quantised base, to which the update is added instead.
        requantize: For a file, the format to round tensors to that do not merge exactly, which are all but QA-LoRA's;
            ``keep`` for the format of each.
        certificate_tolerance: By how much rounding, or ``onto``, may raise the held-out loss, in nats per token; above
            it nothing is written. 0.05 if missing.
        overwrite: Replace the output if it exists; of directories those alone that an earlier merge or export wrote.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What was proved and measured.

    Raises:
        OutputExistsError: The output exists and ``overwrite`` is not set, or it is not what lorafit wrote.
        MissingFileError: The run or its base is not there.
        MergeError: The run cannot be merged so, or what was written is not what it should be.

    Warns:
        LorafitWarning: The update was added to something else than what it was trained beside, or that cannot be told.
    """
    console = console or Console(quiet=True)
    target = Path(output)
    if target.suffix.lower() == ".gguf":
        if dtype or onto:
            option, value, instead = ("--dtype", dtype, "--requantize") if dtype else ("--onto", onto, "a directory")
            raise MergeError(f"{option} {value} has no effect on a GGUF file; give {instead} instead")
        return _merge_file(run, target, base, requantize, certificate_tolerance, overwrite, console)
    if target.suffix.lower() in _OTHER_FILES:
        raise MergeError(f"{output}: merge writes a .gguf file or a directory of safetensors; give the directory")
    if requantize:
        raise MergeError(f"--requantize {requantize} has no effect on a directory; choose its type by --dtype")
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise MergeError(f"--dtype is {dtype}, but must be one of fp32, bf16, fp16")
    return _merge_directory(run, target, base, dtype or "fp32", onto, certificate_tolerance, overwrite, console)


def _merge_file(
    run: str,
    target: Path,
    base: str | None,
    requantize: Requantize | None,
    tolerance: float | None,
    overwrite: bool,
    console: Console,
) -> Certificate:
    proof = _certificate_path(target)
    for path in (target, proof):
        if path.is_dir():
            raise MergeError(f"{path} is a directory; name a file")
        if path.exists() and not overwrite:
            raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")

    from lorafit import merging
    from lorafit.containers.atomic import replacing

    plan = merging.plan(run, base=base, requantize=requantize, certificate_tolerance=tolerance)
    if target.exists() and target.samefile(plan.base.path):
        raise MergeError(f"{target} is the base of the run, which later runs and merges need; choose another name")
    # The certificate is on the disk before the model takes its place, and takes its own right after.
    with _naming(target), replacing(proof) as proof_written, replacing(target) as written:
        console.print(f"copying {plan.base.path}, with {len(plan.changes)} tensors as trained in {run}")
        merging.apply(plan, written)
        certificate = merging.certify(plan, written, target.name, say=console.print)
        proof_written.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _merge_directory(
    run: str,
    target: Path,
    base: str | None,
    dtype: MergeDtype,
    onto: str | None,
    tolerance: float | None,
    overwrite: bool,
    console: Console,
) -> DirectoryCertificate:
    proof = _certificate_path(target)
    _check_directory(target, proof, overwrite)

    import torch

    from lorafit import merging
    from lorafit.containers.atomic import replacing, replacing_directory

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    plan = merging.plan_directory(run, types[dtype], base=base, onto=onto, certificate_tolerance=tolerance)
    for path in plan.inputs:
        if path.resolve().is_relative_to(target.resolve()):
            raise MergeError(f"{target} would replace {path}, which this merge reads; choose another name")
    with _naming(target), replacing(proof) as proof_written, replacing_directory(target) as written:
        certificate = merging.apply_directory(plan, written, target.name, say=console.print)
        proof_written.write_text(certificate.as_json(), encoding="utf-8")
    return certificate


def _certificate_path(output: str | Path) -> Path:
    """Where the certificate of an output lies."""
    return Path(f"{output}.certificate.json")


def _check_directory(target: Path, proof: Path, overwrite: bool) -> None:
    """Only an empty place is written to, or with ``overwrite`` what an earlier merge or export left."""
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    for path, there in ((target, taken), (proof, proof.exists())):
        if there and not overwrite:
            raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")
    if proof.is_dir():
        raise OutputExistsError(f"{proof} is in the way; choose another name")
    if taken and not _is_ours(target):
        raise OutputExistsError(f"{target} is not what a merge wrote, so it is not replaced; choose another name")


def _is_ours(path: Path) -> bool:
    try:
        settings = json_module.loads((path / "config.json").read_text(encoding="utf-8"))
        return not settings.keys().isdisjoint({"lorafit_merged", "lorafit_origin"})
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """A full disk is noticed by a write, which does not know of which file: name the output."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(output)
        raise


def merge_command(
    run: str,
    output: str,
    /,
    *,
    base: str | None = None,
    dtype: MergeDtype | None = None,
    onto: str | None = None,
    requantize: Requantize | None = None,
    certificate_tolerance: float | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write the tuned model as one GGUF file or a directory of safetensors, with a certificate of what it is.

    Args:
        run: Directory of a run, or of an adapter.
        output: The GGUF file to write, for a run with --method qalora without any loss; or, where the name does not end
            in .gguf, the directory, which transformers loads. A certificate is written beside it as
            OUTPUT.certificate.json.
        base: The model that was trained on, if it is not where the run or adapter says that it is.
        dtype: For a directory, the type of the weights: fp32 rounds nothing, bf16 and fp16 take half the space.
            [default: fp32]
        onto: For a directory, the original of the quantised base that was trained on. The update is added to it instead
            of to the base that was trained on, with a warning that says how far the two are apart.
        requantize: For a GGUF file, the format to which tensors are rounded anew after the update was added; keep is
            the format of each. Without it a quantised file takes QA-LoRA's updates only, which need no rounding.
        certificate_tolerance: By how much --requantize, --dtype or --onto may raise the held-out loss above that of
            the run, in nats per token; above it nothing is written. [default: 0.05]
        overwrite: Replace the output if it exists; of directories those alone that an earlier merge or export wrote.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    from lorafit.merging import Certificate

    console = Console(json=json)
    certificate = merge(
        run,
        output,
        base=base,
        dtype=dtype,
        onto=onto,
        requantize=requantize,
        certificate_tolerance=certificate_tolerance,
        overwrite=overwrite,
        console=console,
    )
    path = shlex.quote(output)
    if isinstance(certificate, Certificate):
        show_file(console, certificate)
        modelfile = shlex.quote(f"FROM {Path(output).resolve()}")
        files = {
            "model": f"{output} ({readable_bytes(certificate.merged.size)}, SHA-256 {certificate.merged.sha256})",
            "certificate": str(_certificate_path(output)),
            "llama.cpp": f"llama-cli -m {path}",
            "Ollama": f"echo {modelfile} > Modelfile && ollama create {shlex.quote(Path(output).stem)} -f Modelfile",
        }
    else:
        show_directory(console, certificate)
        size = sum((Path(output) / file).stat().st_size for file in certificate.files)
        files = {"model": f"{output} ({readable_bytes(size)})", "certificate": str(_certificate_path(output))}
    console.fields("Files", files)
    console.result(certificate.as_dict())
