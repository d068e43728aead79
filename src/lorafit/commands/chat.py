"""``lorafit chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorafit.commands.console import Console
from lorafit.commands.generate import Sampling
from lorafit.commands.importing import import_for_good
from lorafit.errors import DataError

if TYPE_CHECKING:
    from lorafit.data.readers import Message

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this."


def chat_command(
    model: str,
    /,
    *,
    adapter: str | None = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
) -> None:
    """Talk with a model or a run.

    Args:
        model: A .gguf file, a Hugging Face directory, smollm2-135m, or the directory of a run.
        adapter: Directory of an adapter for this model, as PEFT or lorafit writes them.
        sampling: How the answers are drawn.
    """
    # Importing it is what gives input() its line editing; Windows has its own.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

    import_for_good("lorafit.models.load")
    from lorafit.models.load import load

    console = Console()
    sampling = sampling or Sampling()
    loaded, tokenizer = load(model, adapter=adapter)
    console.print(HELP, style="dim")
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages.clear()
            console.print("The conversation is forgotten.", style="dim")
        elif line.startswith("/"):
            console.print(HELP if line == "/help" else f"There is no {line.split()[0]}. {HELP}", style="dim")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for piece in sampling.answer(loaded, tokenizer, messages):
                    answer += piece
                    console.stream(piece)
            except KeyboardInterrupt:
                pass
            except DataError as error:
                console.print(f"{error}; /reset starts anew", style="red")
            console.stream("\n")
            # What was said so far stays in the conversation; a turn without an answer was never taken.
            if answer.strip():
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()
