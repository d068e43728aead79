"""Certificates of merges, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorafit.commands.console import Console

if TYPE_CHECKING:
    from lorafit.merging import Certificate, DirectoryCertificate, HeldOut
    from lorafit.merging.engine import NotMeasured

_SHOWN_CHARACTERS = 300  # of a question


def show_file(console: Console, certificate: Certificate) -> None:
    """Writes the certificate of a merged GGUF file."""
    from lorafit.merging.engine import Answers, InLlamaCpp

    weights, engine = certificate.weights, certificate.llamacpp
    answers = engine.answers if isinstance(engine, InLlamaCpp) else engine
    rounded, grown = certificate.requantized, certificate.merged.size - certificate.base.size
    size = f"the size changes by {grown:+,} ({grown / certificate.base.size:+.1%})" if grown else "the size is the same"
    facts = {}
    if weights.bit_identical:
        facts["weights"] = f"bit-identical to those trained: {weights.offsets:,} offsets in {weights.tensors} tensors"
    if weights.promoted:
        facts["promoted"] = f"as for training: {_counts(weights.promoted)}"
    if rounded is not None:
        grid = f", {rounded.dithered} at random onto the grid that they had" if rounded.dithered else ""
        facts["not exact"] = (
            f"{_counts(rounded.formats)}: update added, rounded anew{grid}; weights off by {rounded.relative_error:.2%}"
        )
    base = f"the promoted {certificate.base.name}" if weights.promoted else certificate.base.name
    if weights.bit_identical:
        those = "of the exact tensors, " if rounded is not None else ""
        facts["bytes"] = f"{those}{weights.bytes_changed:,} differ from {base}, all in offsets; {size}"
    else:
        facts["bytes"] = f"{weights.untouched} tensors and all metadata are those of {base}; {size}"
    facts["loss in lorafit"] = _losses(certificate.held_out, "file", exact=rounded is None)
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


def show_directory(console: Console, certificate: DirectoryCertificate) -> None:
    """Writes the certificate of a merged directory."""
    rounding = certificate.rounding
    base = f"{certificate.base} as {certificate.quantize}" if certificate.quantize else certificate.base
    onto = certificate.onto.name if certificate.onto else base
    rounded = "without rounding" if certificate.dtype == "float32" else f"weights off by {rounding.relative:.2%}"
    console.fields(
        f"Certificate of {certificate.output}",
        {
            "weights": f"{certificate.parameters:,} in {certificate.tensors} tensors; {certificate.dtype}, {rounded}",
            "merged": f"{certificate.changed} tensors, added in float32 to those of {onto}",
            "base": f"{'the' if certificate.base_checked else 'not known to be the'} one that was trained on",
            "loss in lorafit": _losses(certificate.held_out, "directory", exact=False),
        },
    )


def _losses(held_out: HeldOut | NotMeasured, written: str, *, exact: bool) -> str:
    from lorafit.merging.engine import NotMeasured

    if isinstance(held_out, NotMeasured):
        return f"not measured: {held_out.not_measured}"
    same = ", equal to the last bit" if exact else f" ({held_out.merged_loss - held_out.run_loss:+.4f})"
    return (
        f"{held_out.base_loss:.4f} for the base, {held_out.run_loss:.4f} for the run and {held_out.merged_loss:.4f} "
        f"for the {written}{same} ({held_out.tokens:,} held-out answer tokens, {held_out.compute})"
    )


def _counts(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} from {name}" for name, count in formats.items())
