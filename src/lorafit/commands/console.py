"""What a command says, and where: text for people through rich, or one JSON document for programs.

Text goes to stdout. With ``--json`` stdout carries the document alone and the text goes to stderr, so that a pipe into
another program never meets a table. rich is imported when the first line is written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console
    import rich.progress

    from lorafit.modules import Coverage

# Without a terminal a line of progress comes after this share of the steps, or after this many seconds.
_LINE_EVERY_SHARE = 0.1
_LINE_EVERY_SECONDS = 60.0

# Columns of tables and panels that go into a file or a pipe.
_WIDTH_OF_FILES = 110


class Console:
    """Where a command's output goes.

    Args:
        json: Whether stdout is kept for a JSON document.
        quiet: Whether to say nothing, for callers from Python.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    @cached_property
    def rich(self) -> rich.console.Console:
        """The rich console for human text."""
        from rich.console import Console as RichConsole

        # What users wrote (prompts, paths, file contents) must never be read as markup or coloured as code.
        file = sys.stderr if self.json else sys.stdout
        console = RichConsole(file=file, quiet=self.quiet, markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = _WIDTH_OF_FILES
        return console

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches."""
        return self.rich.is_terminal

    def print(self, text: str = "", *, style: str | None = None) -> None:
        """Writes a paragraph, wrapped to the terminal; a pipe gets it unwrapped."""
        self.rich.print(text, style=style, soft_wrap=not self.is_terminal)

    def stream(self, text: str) -> None:
        """Writes a piece of text at once, exactly as it is and without a line break."""
        print(text, end="", flush=True, file=sys.stderr if self.json else sys.stdout)

    def marked(self, pieces: Sequence[tuple[str, bool]]) -> None:
        """Writes text of which some pieces are marked, by colour and, for pipes and eyes that see none, by « and »."""
        from rich.text import Text

        text = Text()
        for piece, marked in pieces:
            text.append(f"«{piece}»" if marked else piece, "green" if marked else "dim")
        self.rich.print(text, soft_wrap=not self.is_terminal)

    def fields(self, title: str, values: Mapping[str, Any]) -> None:
        """Writes names and values in two columns."""
        if title:
            self.print(title, style="bold")
        width = max(map(len, values), default=0)
        for name, value in values.items():
            self.print(f"  {name:<{width}}  {_readable(value)}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table; columns that hold numbers only are aligned to the right."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if title:
            self.print(title, style="bold")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_readable(cell)) for cell in row))
        self.rich.print(table)

    def side_by_side(self, title: str, texts: Mapping[str, str]) -> None:
        """Writes texts in panels beside one another, or below one another where there is no room."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        if title:
            self.print(title, style="bold")
        panels = [Panel(Text(text), title=Text(name), title_align="left") for name, text in texts.items()]
        if self.rich.width < 40 * len(panels):
            for panel in panels:
                self.rich.print(panel)
            return
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in panels:
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        self.rich.print(grid)

    def coverage(self, coverage: Coverage) -> None:
        """Writes which layers are trained and which are left frozen and why, a line for those alike in every block."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for name in (*coverage.wrapped, *coverage.frozen):
            key = (_pattern(name), coverage.formats.get(name, ""), coverage.fate(name))
            groups.setdefault(key, []).append(coverage.wrapped.get(name, 0))
        rows = [
            (pattern.rsplit("*.", 1)[-1], form, len(parameters), state, sum(parameters))
            for (pattern, form, state), parameters in groups.items()
        ]
        self.table("Coverage", ["layers", "format", "count", "state", "trained parameters"], rows)
        trainable, total = coverage.trainable_parameters, coverage.total_parameters
        self.print(f"{trainable:,} parameters are trained beside {total:,} ({trainable / total:.2%}).")
        if coverage.promoted:
            self.print(
                f"Promotion gives {len(coverage.promoted):,} tensors block offsets: the merged file will be "
                f"{readable_bytes(coverage.promotion_bytes)} larger than the base, and until then "
                f"{readable_bytes(coverage.promoted_memory_bytes)} of promoted blocks are held in memory."
            )

    @contextmanager
    def progress(self, task: str, total: int, *, done: int = 0) -> Iterator[Progress]:
        """Shows how far a loop of ``total`` steps is: a bar on a terminal, now and then a line elsewhere.

        Args:
            task: What is going on, for example ``training``.
            total: Number of steps.
            done: Steps that were done before, when a run goes on.
        """
        if not self.is_terminal:
            yield Progress(self, task, total, done)
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with RichProgress(*columns, console=self.rich, transient=False) as bar:
            bar.add_task(task, total=total, completed=done, figures="")
            yield Progress(self, task, total, done, bar)

    def result(self, document: Mapping[str, Any]) -> None:
        """Writes the JSON document, if one was asked for; numbers that JSON lacks (nan, inf) become null."""
        if self.json:
            print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


class Progress:
    """How far a loop is; made by `Console.progress`."""

    def __init__(
        self, console: Console, task: str, total: int, done: int, bar: rich.progress.Progress | None = None
    ) -> None:
        self._console, self._task, self._total, self._bar = console, task, total, bar
        self._first = self._shown = done
        self._started = self._shown_at = time.monotonic()

    def update(self, done: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Says that ``done`` steps are done, with the figures of the latest."""
        figures = []
        if loss is not None:
            figures.append(f"loss {loss:.3f}")
        if tokens_per_second is not None:
            figures.append(f"{tokens_per_second:,.0f} tokens/s")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures="  ".join(figures))
            return
        now = time.monotonic()
        due = done - self._shown >= self._total * _LINE_EVERY_SHARE or now - self._shown_at >= _LINE_EVERY_SECONDS
        if not (due or done == self._first + 1 or done == self._total):
            return
        left = (now - self._started) / max(done - self._first, 1) * (self._total - done)
        figures.append(f"{readable_seconds(left)} left")
        self._console.print(f"{self._task} {done}/{self._total}  {'  '.join(figures)}")
        self._shown, self._shown_at = done, now


def readable_seconds(seconds: float) -> str:
    """Seconds as people say them: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def readable_bytes(count: float) -> str:
    """Bytes as people say them, in units of 1000: ``93 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def readable_names(names: Sequence[str]) -> str:
    """Names, of which those that are alike in every block are one with their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    return ", ".join(
        those[0] if len(those) == 1 else f"{len(those)} × {pattern.rsplit('*.', 1)[-1]}"
        for pattern, those in groups.items()
    )


def _pattern(name: str) -> str:
    """A module's name with ``*`` for the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    """The same value in JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and value - value != 0:
        return None
    return value
