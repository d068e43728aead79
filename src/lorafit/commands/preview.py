"""``lorafit preview``: what the data would teach, before any time is spent on it."""

from __future__ import annotations

from dataclasses import asdict

from lorafit.commands.console import Console
from lorafit.commands.importing import import_for_good
from lorafit.errors import ConfigError

_SHOWN_SOURCES = 10


def preview_command(
    model: str, data: str, /, *, rows: int = 2, max_length: int | None = None, json: bool = False
) -> None:
    """Show which tokens would be trained, how long the rows are, and what would be cut.

    Args:
        model: A .gguf file, a Hugging Face directory, or smollm2-135m; its tokenizer and chat template are used.
        data: Training rows, as for train.
        rows: How many rows to show in full.
        max_length: Longest document in tokens, as for train. [default: the model's context]
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    if rows < 0:
        raise ConfigError(f"--rows is {rows}, but must be 0 or more")
    if max_length is not None and max_length < 1:
        raise ConfigError(f"--max-length is {max_length}, but must be at least 1")

    import_for_good("lorafit.models.load")
    from lorafit.data.chat import encode_all
    from lorafit.data.preview import lengths, pieces, too_long
    from lorafit.data.readers import read_examples
    from lorafit.models.load import load

    console = Console(json=json)
    examples = read_examples(data)
    loaded, tokenizer = load(model)
    limit = max_length or loaded.config.max_position_embeddings
    documents = encode_all(examples, tokenizer)
    table, long = lengths(documents), too_long(documents, limit)
    shown = {document.source: pieces(document, tokenizer) for document in documents[:rows]}

    for source, parts in shown.items():
        console.print(f"{source}  («green» is trained)", style="bold")
        console.marked([(part.text, part.trained) for part in parts])
    console.fields(
        "Tokens",
        {
            "rows": table.rows,
            "shortest, median, 95%, longest": f"{table.min:,}, {table.median:,}, {table.p95:,}, {table.max:,}",
            "all": table.total,
            "trained": f"{table.trained:,} ({table.trained / table.total:.0%})",
        },
    )
    if long:
        names = ", ".join(document.source for document in long[:_SHOWN_SOURCES])
        rest = f" and {len(long) - _SHOWN_SOURCES} more" if len(long) > _SHOWN_SOURCES else ""
        console.print(
            f"Longer than {limit:,} tokens, so train refuses them, or cuts them with --truncate: {names}{rest}."
        )
    else:
        console.print(f"No row is longer than {limit:,} tokens, so nothing would be cut.")
    console.result(
        {
            "lengths": asdict(table),
            "max_length": limit,
            "too_long": [document.source for document in long],
            "rows": {source: [asdict(part) for part in parts] for source, parts in shown.items()},
        }
    )
