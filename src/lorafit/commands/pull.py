"""``lorafit pull``: fetch an embedded model ahead of time, for example before going offline."""

from __future__ import annotations

from lorafit.commands.console import Console


def pull_command(name: str = "smollm2-135m", /, *, json: bool = False) -> None:
    """Fetch an embedded model into the cache.

    Args:
        name: Name of the model. There is smollm2-135m: SmolLM2-135M-Instruct Q4_1, Apache-2.0, by HuggingFaceTB.
        json: Print one JSON document instead of text.
    """
    from lorafit.models.pull import EMBEDDED, pull

    console = Console(json=json)
    path = pull(name)
    model = EMBEDDED[name]
    console.fields(
        model.title,
        {"file": str(path), "size": f"{model.nbytes / 1e6:.0f} MB", "licence": model.licence, "author": model.author},
    )
    console.result(
        {"name": name, "path": str(path), "sha256": model.sha256, "licence": model.licence, "author": model.author}
    )
