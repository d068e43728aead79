"""Everything that is wrong with a model, said at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import ModelError


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Raise one error for all differences between a model and its files, if there are any.

    Raises:
        ModelError: There are.
    """
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{path} does not hold the model that it describes: {'; '.join(problems[:5])}{rest}")
