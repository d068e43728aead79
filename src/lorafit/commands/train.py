"""``lorafit train``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorafit.commands.console import Console
from lorafit.config import TrainConfig


def train_command(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    config_file: Annotated[str | None, Parameter(name="--config")] = None,
    resume: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train an adapter on a model and a file of examples.

    Args:
        config: The settings.
        config_file: YAML file with any of these settings, for example the config.yaml of another run. What the command
            line says wins; a switch is turned off again by --switch=false.
        resume: Directory of a run that was interrupted: go on from its last checkpoint, with its settings.
        dry_run: Show what would be adapted, measure a step, and say how long and how much memory the run would take.
        json: Print the summary as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    raise NotImplementedError
