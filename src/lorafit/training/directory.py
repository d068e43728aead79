"""The directory of a run.

``config.yaml`` holds every setting, resolved; ``heldout.jsonl`` the rows that were held out; ``metrics.jsonl`` a
line for the start, for every step and for every evaluation; ``checkpoints/`` the state to resume from; ``adapter/``,
``summary.json``, ``loss.png`` and ``report.md`` come when the run is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lorafit.config import TrainConfig, read_settings
from lorafit.containers.atomic import fingerprint, write_text
from lorafit.data.readers import Example
from lorafit.errors import ConfigError, MissingFileError, OutputExistsError, TrainingError
from lorafit.evaluation.loss import Metrics


class RunDirectory:
    """Where a run keeps its files.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def adapter(self) -> Path:
        """Where the adapter goes."""
        return self.path / "adapter"

    def check_free(self, overwrite: bool) -> None:
        """Refuse a place that is taken.

        Raises:
            OutputExistsError: Something is there that may not be replaced.
        """
        if not self.path.exists():
            return
        if not overwrite:
            raise OutputExistsError(f"{self.path} exists; choose another --output, or replace it with --overwrite")
        # Replacing means removing, so it must be a run and not, say, somebody's home.
        is_run = (self.path / "config.yaml").is_file() and (self.path / "metrics.jsonl").is_file()
        if not self.path.is_dir() or (any(self.path.iterdir()) and not is_run):
            raise OutputExistsError(
                f"{self.path} is not a run, so --overwrite does not replace it; choose another --output"
            )

    def create(self, config: TrainConfig, base: Path, held_out: Sequence[Example]) -> None:
        """Make the directory anew, with the settings, the held-out rows, and what resuming will be checked against."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        settings = {key: value for key, value in asdict(config).items() if value is not None and key != "overwrite"}
        self.record({"step": 0, **_inputs(config, base)})
        write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if held_out:
            rows = (json.dumps({"messages": row.messages}, ensure_ascii=False) for row in held_out)
            write_text(self.path / "heldout.jsonl", "\n".join(rows) + "\n")

    def resumable_config(self, asked: TrainConfig) -> TrainConfig:
        """The settings of the run, if nothing else was asked for.

        Raises:
            MissingFileError: It is not a run.
            ConfigError: It is complete, or another setting was asked for.
        """
        if not (self.path / "config.yaml").is_file():
            raise MissingFileError(f"{self.path} is not a run: it has no config.yaml")
        if (self.path / "summary.json").is_file():
            raise ConfigError(f"{self.path} is complete, so there is nothing to resume")
        settings = read_settings(self.path / "config.yaml")
        for name, value in settings.items():
            if name != "output" and getattr(asked, name) != value:
                raise ConfigError(
                    f"--resume goes on with the settings of the run, where {name} is {value}; leave out "
                    f"--{name.replace('_', '-')}, or start a new run"
                )
        return TrainConfig(**{**settings, "output": str(self.path)})

    def rewind(self, step: int, config: TrainConfig, base: Path) -> None:
        """Forget what happened after ``step``, which will happen again.

        Raises:
            TrainingError: The base or the data have changed since the run began.
        """
        records = self.records()
        for name, value in _inputs(config, base).items():
            if records[0][name] != value:
                what = "base" if name == "base_sha256" else "data"
                raise TrainingError(
                    f"{self.path}: the {what} changed since this run began, so it cannot go on; train anew"
                )
        kept = (record for record in records if record["step"] <= step)
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def record(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def record_evaluation(self, step: int, metrics: Metrics | None) -> None:
        """Append an evaluation, if there was one."""
        if metrics:
            self.record({"step": step, **{f"eval_{key}": value for key, value in metrics.as_dict().items()}})

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def evaluation_at(self, step: int) -> Metrics | None:
        """The evaluation that was recorded at a step."""
        for record in self.records():
            if record["step"] == step and "eval_loss" in record:
                return Metrics(**{name: record[f"eval_{name}"] for name in Metrics.__dataclass_fields__})
        return None


def _inputs(config: TrainConfig, base: Path) -> dict[str, str]:
    """Fingerprints of what a run starts from."""
    inputs = {"base_sha256": fingerprint(base), "data_sha256": fingerprint(config.data)}
    return inputs | ({"eval_data_sha256": fingerprint(config.eval_data)} if config.eval_data else {})
