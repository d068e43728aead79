"""The directory of a run.

``config.yaml`` holds every setting, resolved, with paths that hold wherever it is read; ``heldout.jsonl`` the rows that
were held out; ``metrics.jsonl`` a line for what the run started from, for every step and for every evaluation;
``checkpoints/`` the state to resume from; ``adapter/``, ``summary.json``, ``loss.png`` and ``report.md`` come when the
run is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lorafit.adapters.peft import IMPORTANCE_FILE, weights_file
from lorafit.adapters.updates import adapter_directory
from lorafit.config import TrainConfig, read_settings
from lorafit.containers.atomic import fingerprint, write_text
from lorafit.data.readers import Example
from lorafit.errors import ConfigError, MissingFileError, OutputExistsError
from lorafit.evaluation.loss import Metrics
from lorafit.models.pull import EMBEDDED

# What a run consists of. The file by which a run is known goes last where they are removed, and comes first where they
# are written: whatever is left by an interruption can be replaced.
_PARTS = (
    "summary.json", "report.md", "loss.png", "adapter", "checkpoints", "heldout.jsonl", IMPORTANCE_FILE, "config.yaml",
    "metrics.jsonl",
)  # fmt: skip

# Settings that say how a run is started, not what it computes.
_NOT_KEPT = ("overwrite",)

# Settings that change what a step costs, but no bit of what it computes.
_COSTS = ("memory",)

# Settings that may say the same in other words; what counts is what lies there.
_PATHS = ("model", "adapter", "data", "eval_data", "output")


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

    @property
    def metrics(self) -> Path:
        """Where steps and evaluations are recorded."""
        return self.path / "metrics.jsonl"

    def check_free(self, config: TrainConfig) -> None:
        """Refuse a place that is taken, or that a directory cannot be made at.

        Raises:
            OutputExistsError: Something is there that may not be replaced.
            ConfigError: The place is inside a file, or replacing what is there would remove what the run reads.
        """
        path = self.path
        if not path.exists():
            above = next(parent for parent in path.absolute().parents if parent.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise ConfigError(f"--output {path}: no directory can be made in {above}; choose another --output")
            return
        if path.is_dir() and not any(path.iterdir()):
            return
        if not self._is_run():
            raise OutputExistsError(f"{path} exists and is not a run, so it is not replaced; choose another --output")
        if not config.overwrite:
            raise OutputExistsError(f"{path} exists; choose another --output, or replace it with --overwrite")
        for name in (config.model, config.adapter, config.data, config.eval_data):
            if name and any(_lies_in(place, path / part) for part in _PARTS for place in (name, f"{name}/adapter")):
                raise ConfigError(f"--overwrite would remove {name}, which this run reads; choose another --output")

    def _is_run(self) -> bool:
        try:
            return "base_sha256" in self.records()[0]
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def create(self, config: TrainConfig, base: Path, held_out: Sequence[Example]) -> None:
        """Begin a run, in place of an older one, with what resuming will be checked against."""
        inputs = {"step": 0, **_inputs(config, base)}
        settings = yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True)
        rows = [json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n" for row in held_out]
        self._remove()
        try:
            write_text(self.metrics, json.dumps(inputs) + "\n")
            if rows:
                write_text(self.path / "heldout.jsonl", "".join(rows))
            write_text(self.path / "config.yaml", settings)
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        """Remove what runs consist of, and nothing else that may lie in the directory."""
        for part in _PARTS:
            if (self.path / part).is_dir():
                shutil.rmtree(self.path / part)
            else:
                (self.path / part).unlink(missing_ok=True)

    def check_resumable(self) -> None:
        """Refuse to go on with what is no run, or a complete one.

        Raises:
            MissingFileError: It is not a run.
            ConfigError: It is complete.
        """
        if not (self.path / "config.yaml").is_file() or not self._is_run():
            raise MissingFileError(f"{self.path} is not a run, so it cannot be resumed; give what --output named")
        if (self.path / "summary.json").is_file():
            raise ConfigError(f"{self.path} is complete, so there is nothing to resume; train anew to train longer")

    def check_same(self, config: TrainConfig, base: Path) -> None:
        """Refuse to go on with other settings, another base or other data than the run began with.

        Raises:
            ConfigError: A setting, the base or the data differ.
        """
        begun = read_settings(self.path / "config.yaml")
        for name, value in asdict(config).items():
            was = begun.get(name)
            if name not in (*_NOT_KEPT, *_COSTS, *_PATHS) and value != was:
                raise ConfigError(
                    f"--resume keeps the settings of the run, where {name} is {was}, not {value}; leave out "
                    f"--{name.replace('_', '-')}, or start a new run"
                )
        inputs, first = _inputs(config, base), self.records()[0]
        for name in sorted((first.keys() - {"step"}) | inputs.keys()):
            if inputs.get(name) != first.get(name):
                what = name.removesuffix("_sha256").replace("_", " ")
                raise ConfigError(f"{self.path}: its {what} changed since it began, so it cannot go on; train anew")

    def rewind(self, step: int, last_step: int) -> None:
        """Forget what happened after ``step``, and what will be measured again at the end."""
        kept = (
            record
            for record in self.records()
            if record["step"] <= step and not (record["step"] == last_step and "eval_loss" in record)
        )
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def record(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def record_evaluation(self, step: int, metrics: Metrics | None, kind: str = "eval") -> None:
        """Append an evaluation, if there was one."""
        if metrics:
            self.record({"step": step, **{f"{kind}_{key}": value for key, value in metrics.as_dict().items()}})

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; one that was not written to its end is passed over."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def evaluation_at(self, step: int, kind: str = "eval") -> Metrics | None:
        """The evaluation that was recorded at a step."""
        for record in self.records():
            if record["step"] == step and f"{kind}_loss" in record:
                return Metrics(**{name: record[f"{kind}_{name}"] for name in Metrics.__dataclass_fields__})
        return None


def lasting_name(name: str) -> str:
    """How a run finds a model or a file again: a known name as it is, a path from anywhere."""
    return name if name in EMBEDDED else os.path.abspath(name)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What ``config.yaml`` says."""
    settings = {key: value for key, value in asdict(config).items() if value is not None and key not in _NOT_KEPT}
    return settings | {key: lasting_name(settings[key]) for key in _PATHS if key in settings}


def _inputs(config: TrainConfig, base: Path) -> dict[str, str]:
    """Fingerprints of what a run starts from."""
    inputs = {"base_sha256": fingerprint(base), "data_sha256": fingerprint(config.data)}
    if config.adapter:
        inputs["adapter_sha256"] = fingerprint(weights_file(adapter_directory(config.adapter)))
    return inputs | ({"eval_data_sha256": fingerprint(config.eval_data)} if config.eval_data else {})


def _lies_in(name: str, place: Path) -> bool:
    return Path(os.path.realpath(name)).is_relative_to(os.path.realpath(place))
