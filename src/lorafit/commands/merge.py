"""``lorafit merge``."""

from __future__ import annotations

from lorafit.commands.console import Console


def merge_command(run: str, output: str, /, *, overwrite: bool = False, json: bool = False) -> None:
    """Write the tuned model as one file, with a certificate that it is the model that was trained.

    Args:
        run: Directory of a run trained with --method qalora.
        output: The GGUF file to write; the certificate is written beside it as OUTPUT.certificate.json.
        overwrite: Replace the output if it exists.
        json: Print the certificate as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    raise NotImplementedError
