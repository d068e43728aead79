"""What every format of ``lorafit export`` is given, and what each checks before it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lorafit.commands.console import Console
from lorafit.config import GGUFType, Requantize
from lorafit.errors import ConfigError, OutputExistsError

ExportDtype = Literal["fp32", "fp16", GGUFType]


@dataclass(frozen=True)
class Request:
    """What is to be exported; options that were not given are None.

    Attributes:
        model: A model as `lorafit.load` takes it.
        output: The file or directory to write.
        dtype: Type of the weights.
        requantize: Format that tensors are rounded to which cannot be merged exactly.
        overwrite: Replace the output if an earlier export wrote it.
        console: Where to say what is going on.
        eval_data: Rows to measure the loss on.
        certificate_tolerance: By how much that may be larger than the model's.
        adapter: The adapter to export, if ``model`` is its base.
    """

    model: str
    output: str
    dtype: ExportDtype | None
    requantize: Requantize | None
    overwrite: bool
    console: Console
    eval_data: str | None = None
    certificate_tolerance: float | None = None
    adapter: str | None = None

    @property
    def target(self) -> Path:
        """The output's path."""
        return Path(self.output)

    @property
    def proof(self) -> Path:
        """Where its certificate goes."""
        return Path(f"{self.output}.certificate.json")


class Certificate(Protocol):
    """What was proved and measured about an output."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        ...


def check_free(request: Request, *, directory: bool, mine: Callable[[Path], bool]) -> None:
    """Only an empty place is written to, or with ``overwrite`` what an earlier export left.

    Args:
        request: The request.
        directory: Whether the output is one; otherwise it is a file.
        mine: Whether an export wrote what stands at a path.

    Raises:
        OutputExistsError: Something else stands there.
    """
    target, proof = request.target, request.proof
    for path in (target, proof):
        if path.exists() and not request.overwrite and not (path.is_dir() and not any(path.iterdir())):
            raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")
    if target.exists() and target.is_dir() != directory:
        raise OutputExistsError(f"{target} is in the way; choose another name")
    if proof.is_dir():
        raise OutputExistsError(f"{proof} is in the way; choose another name")
    if target.exists() and not (directory and not any(target.iterdir())) and not mine(target):
        raise OutputExistsError(f"{target} is not what an export wrote, so it is not replaced; choose another name")


def checked_tolerance(request: Request) -> float | None:
    """The tolerance, if there is one.

    Raises:
        ConfigError: It is none.
    """
    tolerance = request.certificate_tolerance
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ConfigError(f"--certificate-tolerance is {tolerance:g}, but must be at least 0")
    return tolerance


@contextmanager
def naming_full_disks(request: Request) -> Iterator[None]:
    """A full disk is noticed by a write, which does not know of which file: name the output."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = request.output
        raise
