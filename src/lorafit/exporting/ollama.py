"""A GGUF file and the Modelfile by which Ollama runs it: ``ollama create NAME -f DIRECTORY/Modelfile``.

Ollama takes no adapters, so what was trained is merged into the file. The chat template in the file is not what Ollama
renders prompts with; the Modelfile has a template in its own language, found by trying the model's out
(``chat_format.py``) and refused where it cannot do the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.data.chat import render_prompt
from lorafit.exporting.chat_format import find_format
from lorafit.exporting.modelfile import modelfile, stops
from lorafit.merging.certificate import FileRecord
from lorafit.models.tokenizer import end_of_turn_ids, tokenizer_from_gguf

WEIGHTS = "model.gguf"
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Prompts:
    """How Ollama writes prompts.

    Attributes:
        system: The system message of conversations without one; "" if there is none.
        stops: Texts at which an answer ends.
        system_has_effect: Whether the chat template has a place for system messages.
        differs_by: In what prompts may differ from those of the model's chat template; empty if in nothing.
    """

    system: str
    stops: list[str]
    system_has_effect: bool
    differs_by: list[str]


@dataclass(frozen=True)
class OllamaCertificate:
    """What is known about an exported directory.

    Attributes:
        lorafit: Version that exported.
        source: Name of the run or model.
        model: The GGUF file in the directory.
        prompts: How Ollama writes prompts.
        weights: The certificate of the merge or the export that made the file; None for one that is the model's.
    """

    lorafit: str
    source: str
    model: FileRecord
    prompts: Prompts
    weights: Mapping[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the directory."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def write_modelfile(directory: Path, source: str, weights: Mapping[str, Any] | None) -> OllamaCertificate:
    """Write the Modelfile of the GGUF file that lies in a directory.

    Args:
        directory: The directory.
        source: Name of the run or model that was exported.
        weights: The certificate of what made the file, if it was made.

    Raises:
        ModelError: The chat template cannot be written for Ollama, or there is none.
    """
    file = GGUFFile.open(directory / WEIGHTS)
    tokenizer = tokenizer_from_gguf(file)
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    endings = tokenizer.convert_ids_to_tokens(sorted(end_of_turn_ids(tokenizer)))
    found = find_format(lambda turns: render_prompt(turns, tokenizer), bos, bos if adds_bos else "", endings)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    licence = file.metadata.get("general.license")
    text = modelfile(WEIGHTS, found, special, licence if isinstance(licence, str) else None)
    (directory / MODELFILE).write_text(text, encoding="utf-8")
    differs_by = []
    if found.trims:
        differs_by.append("white space at the ends of messages, which the chat template takes off and Ollama keeps")
    if found.refuses_system:
        differs_by.append("system messages, which the chat template refuses; they go before the first user's text")
    if "strftime_now" in str(tokenizer.chat_template):
        differs_by.append("the date of today, which the chat template writes; the Modelfile has that of the export")
    model = FileRecord(WEIGHTS, fingerprint(directory / WEIGHTS), (directory / WEIGHTS).stat().st_size)
    prompts = Prompts(found.default or "", stops(found, special), found.place != "nowhere", differs_by)
    return OllamaCertificate(__version__, source, model, prompts, weights)
