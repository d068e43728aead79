"""A chat format as a template of Ollama, and the Modelfile that holds it.

Ollama renders prompts with Go's text/template. ``.Messages`` are the turns, neighbours of one role joined, and
``.System`` is all that system messages say; ``$last`` marks the message that comes last. An action written ``{{-``
swallows all white space before it, so one stands only behind another action, where a line break is layout; text of the
format is followed by plain ``{{``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lorafit.errors import ModelError
from lorafit.exporting.chat_format import ChatFormat

_OPEN = "{{"


def go_template(found: ChatFormat) -> str:
    """The template that renders conversations as the chat format does; an answer that comes last is left open."""
    system, user, assistant = found.system, found.user, found.assistant
    text = _literal(found.prefix)
    if found.default == "":
        text += f"{_literal(system.before)}{{{{ .System }}}}{_literal(system.after)}"
    if found.place == "first":
        text += '{{ $system := "" }}'
    text += "{{ range $i, $_ := .Messages }}\n{{- $last := eq (len (slice $.Messages $i)) 1 }}\n{{- if "
    if found.place == "own" and found.default != "":
        text += (
            f'eq .Role "system" }}}}{_literal(system.before)}{{{{ .Content }}}}{_literal(system.after)}{{{{ else if '
        )
    elif found.place == "first":
        text += 'eq .Role "system" }}{{ $system = .Content }}{{ else if '
    text += f'eq .Role "user" }}}}{_literal(user.before)}'
    if found.place == "first":
        inside = f"{_literal(system.before)}{{{{ $system }}}}{_literal(system.after)}"
        text += f'{{{{ if $system }}}}{inside}{{{{ $system = "" }}}}{{{{ end }}}}'
    elif found.place == "last":
        inside = f"{_literal(system.before)}{{{{ $.System }}}}{_literal(system.after)}"
        text += f"{{{{ if and $last $.System }}}}{inside}{{{{ end }}}}"
    text += f"{{{{ .Content }}}}{_literal(user.after)}"
    text += f'{{{{ else if eq .Role "assistant" }}}}{_literal(assistant.before)}{{{{ .Content }}}}'
    text += f"{{{{ if not $last }}}}{_literal(assistant.after)}{{{{ end }}}}{{{{ end }}}}"
    text += f'\n{{{{- if and $last (ne .Role "assistant") }}}}{_literal(found.generation)}{{{{ end }}}}'
    return text + "\n{{- end }}"


def stops(found: ChatFormat, special: Sequence[str]) -> list[str]:
    """Texts at which an answer ends: what closes one, and special tokens that frames begin and end with.

    Args:
        found: The chat format.
        special: The special tokens of the tokenizer.
    """
    frames = (found.system, found.user, found.assistant)
    written = "".join(each.before + each.after for each in frames if each) + found.generation
    candidates = [found.assistant.after.strip(), *(token for token in special if token in written)]
    return list(dict.fromkeys(each for each in candidates if each))


def modelfile(weights: str, found: ChatFormat, special: Sequence[str], licence: str | None) -> str:
    """The text of a Modelfile.

    Args:
        weights: Name of the GGUF file beside it.
        found: The chat format.
        special: The special tokens of the tokenizer.
        licence: Of the model, if it is known.

    Raises:
        ModelError: A text has characters that a Modelfile cannot hold.
    """
    lines = [f"FROM ./{weights}", f"TEMPLATE {_quoted(go_template(found))}"]
    if found.default:
        lines.append(f"SYSTEM {_quoted(found.default)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops(found, special)]
    if licence:
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Text as it stands in a Go template, in which two braces begin an action."""
    return text.replace(_OPEN, f"{_OPEN} {json.dumps(_OPEN)} }}}}")


def _quoted(text: str) -> str:
    """Text in the quotes of a Modelfile; what cannot be printed is dropped by its reader, so it may not be there."""
    if '"""' in text or not all(each.isprintable() or each in "\n\t" for each in text):
        raise ModelError("the chat template, the system message or the licence has characters that no Modelfile holds")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
