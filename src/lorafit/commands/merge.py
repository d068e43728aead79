"""``lorafit merge``: the tuned model as one file, and the proof that it is the one that was trained."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.commands.console import Console, readable_bytes
from lorafit.config import Requantize
from lorafit.errors import MergeError, OutputExistsError

if TYPE_CHECKING:
    from lorafit.merging import Certificate

_SHOWN_CHARACTERS = 300  # of a question


def merge(
    run: str,
    output: str,
    *,
    requantize: Requantize | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Certificate:
    """Writes the tuned model of a QA-LoRA run as a GGUF file, and its certificate as OUTPUT.certificate.json.

    Both appear whole, and only after everything in the certificate was proved on the written file.

    Args:
        run: Directory of a run trained with ``method="qalora"``.
        output: The GGUF file to write.
        requantize: Format to round tensors to that were trained by plain LoRA; ``keep`` for the format of each.
        tolerance: By how much that may raise the held-out loss, in nats per token; 0.05 if missing.
        overwrite: Replace the output if it exists.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What was proved and measured.

    Raises:
        OutputExistsError: The output exists and ``overwrite`` is not set.
        MissingFileError: The run or its base is not there.
        MergeError: The run cannot be merged so, or the written file is not what it should be.
    """
    target = Path(output)
    proof = _certificate_path(output)
    if target.suffix.lower() != ".gguf":
        raise MergeError(f"{output}: merge writes one GGUF file, so the name must end in .gguf")
    for path in (target, proof):
        if path.is_dir():
            raise MergeError(f"{path} is a directory; name a file")
        if path.exists() and not overwrite:
            raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")

    from lorafit import merging
    from lorafit.containers.atomic import replacing

    say = (console or Console(quiet=True)).print
    plan = merging.plan(run, requantize=requantize, tolerance=tolerance)
    if target.exists() and target.samefile(plan.base.path):
        raise MergeError(f"{output} is the base of the run, which later runs and merges need; choose another name")
    try:
        # The certificate is on the disk before the model takes its place, and takes its own right after.
        with replacing(proof) as proof_written, replacing(target) as written:
            say(f"copying {plan.base.path}, with {len(plan.changes)} tensors as trained in {run}")
            merging.apply(plan, written)
            certificate = merging.certify(plan, written, target.name, say=say)
            proof_written.write_text(certificate.as_json(), encoding="utf-8")
    except OSError as error:
        # A full disk is noticed by a write, which does not know of which file.
        if error.filename is None:
            error.filename = output
        raise
    return certificate


def _certificate_path(output: str | Path) -> Path:
    """Where the certificate of a merged file lies."""
    return Path(f"{output}.certificate.json")


def show(console: Console, certificate: Certificate) -> None:
    """Writes a certificate for people."""
    from lorafit.merging.certificate import HeldOut
    from lorafit.merging.engine import Answers, InLlamaCpp

    weights, held_out, engine = certificate.weights, certificate.held_out, certificate.llamacpp
    answers = engine.answers if isinstance(engine, InLlamaCpp) else engine
    rounded, grown = certificate.requantized, certificate.merged.size - certificate.base.size
    size = f"the size changes by {grown:+,} ({grown / certificate.base.size:+.1%})" if grown else "the size is the same"
    facts = {"weights": f"bit-identical to those trained: {weights.offsets:,} offsets in {weights.tensors} tensors"}
    if weights.promoted:
        facts["promoted"] = f"as for training: {_counts(weights.promoted)}"
    if rounded is not None:
        facts["not exact"] = (
            f"{_counts(rounded.formats)}: plain LoRA added, rounded anew; weights off by {rounded.relative_error:.2%}"
        )
    base = f"the promoted {certificate.base.name}" if weights.promoted else certificate.base.name
    those = "of the exact tensors, " if rounded is not None else ""
    facts["bytes"] = f"{those}{weights.bytes_changed:,} differ from {base}, all in offsets; {size}"
    if isinstance(held_out, HeldOut):
        same = ", equal to the last bit" if rounded is None else f" ({held_out.merged_loss - held_out.run_loss:+.4f})"
        facts["loss in lorafit"] = (
            f"{held_out.run_loss:.4f} for the run and {held_out.merged_loss:.4f} for the file{same} "
            f"({held_out.tokens:,} held-out answer tokens, {held_out.compute})"
        )
    else:
        facts["loss in lorafit"] = f"not measured: {held_out.not_measured}"
    if isinstance(engine, InLlamaCpp):
        facts["llama.cpp"] = f"loads the file and runs it (xllamacpp {engine.version})"
    if isinstance(answers, Answers):
        facts["loss in llama.cpp"] = (
            f"{answers.base_loss:.3f} base, {answers.merged_loss:.3f} merged ({answers.tokens:,} tokens of "
            f"{answers.rows} held-out answers; compare these with one another only)"
        )
    else:
        facts["loss in llama.cpp"] = f"not measured: {answers.not_measured}"
    console.fields(f"Certificate of {certificate.merged.name}", facts)
    if isinstance(answers, Answers):
        asked = textwrap.shorten(answers.prompt[-1]["content"], _SHOWN_CHARACTERS, placeholder=" …")
        title = "\nllama.cpp answers" + ("" if answers.answers_differ else ", both alike") + f": {asked}"
        console.side_by_side(title, {"base": answers.base_answer, "merged": answers.merged_answer})


def _counts(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} from {name}" for name, count in formats.items())


def merge_command(
    run: str,
    output: str,
    /,
    *,
    requantize: Requantize | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write the tuned model as one file, with a certificate that it is the model that was trained.

    Args:
        run: Directory of a run trained with --method qalora.
        output: The GGUF file to write; the certificate is written beside it as OUTPUT.certificate.json.
        requantize: For a run with --frozen-tensors lora: the format to which the tensors that have plain LoRA are
            rounded after it was added; keep stands for the format of each. This part of the merge is not exact.
        tolerance: By how much --requantize may raise the held-out loss, in nats per token, before the file is refused.
            [default: 0.05]
        overwrite: Replace the output if it exists.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    certificate = merge(run, output, requantize=requantize, tolerance=tolerance, overwrite=overwrite, console=console)
    show(console, certificate)
    path, modelfile = shlex.quote(output), shlex.quote(f"FROM {Path(output).resolve()}")
    console.fields(
        "Files",
        {
            "model": f"{output} ({readable_bytes(certificate.merged.size)}, SHA-256 {certificate.merged.sha256})",
            "certificate": str(_certificate_path(output)),
            "llama.cpp": f"llama-cli -m {path}",
            "Ollama": f"echo {modelfile} > Modelfile && ollama create {shlex.quote(Path(output).stem)} -f Modelfile",
        },
    )
    console.result(certificate.as_dict())
