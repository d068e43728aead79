"""A run's directory: what may be replaced, what is remembered, and what going on is checked against."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lorafit.config import TrainConfig, read_settings
from lorafit.data.readers import Example, read_examples
from lorafit.errors import ConfigError, MissingFileError, OutputExistsError
from lorafit.evaluation.loss import Metrics
from lorafit.training.directory import RunDirectory, lasting_name
from tests.training.rows import write_rows

METRICS = Metrics(2.0, 7.389, 0.5, 100)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Settings as they are after they were resolved."""
    (tmp_path / "base.gguf").write_bytes(b"any bytes: only their hash is taken")
    data = write_rows(tmp_path / "rows.jsonl", 4)
    run = str(tmp_path / "run")
    return TrainConfig(
        str(tmp_path / "base.gguf"), data, output=run, method="qalora", learning_rate=2.6e-3, steps=4, overwrite=True
    )


@pytest.fixture
def held_out(config: TrainConfig) -> list[Example]:
    return read_examples(config.data)[:2]


def begin(config: TrainConfig, held_out: list[Example]) -> RunDirectory:
    assert config.output
    directory = RunDirectory(config.output)
    directory.create(config, Path(config.model), held_out)
    return directory


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_run_says_what_it_starts_from(config: TrainConfig, held_out: list[Example]) -> None:
    directory = begin(config, held_out)
    assert names(directory.path) == {"config.yaml", "heldout.jsonl", "metrics.jsonl"}
    assert TrainConfig(**read_settings(directory.path / "config.yaml")) == replace(config, overwrite=False)
    assert [row.messages for row in read_examples(directory.path / "heldout.jsonl")] == [r.messages for r in held_out]
    (first,) = directory.records()
    assert first.keys() == {"step", "base_sha256", "data_sha256"}
    assert begin(config, []).path.joinpath("heldout.jsonl").exists() is False


def test_the_settings_hold_wherever_they_are_read(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(replace(config, model="base.gguf", data="rows.jsonl", output="run"), [])
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    for name in ("model", "data", "output"):
        assert settings[name] == getattr(config, name)
    assert lasting_name("smollm2-135m") == "smollm2-135m"


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_runs_are_replaced_and_only_when_asked(
    config: TrainConfig, held_out: list[Example], tmp_path: Path, overwrite: bool
) -> None:
    config = replace(config, overwrite=overwrite)
    place = RunDirectory(tmp_path / "run")
    place.check_free(config)
    place.path.mkdir()
    place.check_free(config)
    (place.path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(OutputExistsError, match=r"run exists and is not a run.*choose another --output"):
        place.check_free(config)
    # A file that happens to be called like one of a run's does not make a run.
    for text in ("", "not json\n", '{"step": 1}\n', "[]\n", "7\n"):
        (place.path / "metrics.jsonl").write_text(text)
        with pytest.raises(OutputExistsError, match="is not a run"):
            place.check_free(config)
    (place.path / "metrics.jsonl").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="file exists and is not a run"):
        RunDirectory(tmp_path / "file").check_free(config)
    begin(config, held_out)
    if overwrite:
        place.check_free(config)
    else:
        with pytest.raises(OutputExistsError, match="or replace it with --overwrite"):
            place.check_free(config)


def test_replacing_leaves_what_is_not_the_runs(config: TrainConfig, held_out: list[Example]) -> None:
    run = begin(config, held_out).path
    for part in ("summary.json", "loss.png", "report.md", "merged.gguf"):
        (run / part).write_text("older")
    for part in ("adapter", "checkpoints/step-4", "mine"):
        (run / part).mkdir(parents=True)
        (run / part / "file").write_text("older")
    begin(replace(config, seed=7), [])
    assert names(run) == {"config.yaml", "metrics.jsonl", "merged.gguf", "mine"}
    assert (run / "mine" / "file").read_text() == "older"
    assert read_settings(run / "config.yaml")["seed"] == 7


def test_a_run_does_not_remove_what_it_reads(config: TrainConfig, held_out: list[Example], tmp_path: Path) -> None:
    run = begin(config, held_out).path
    (tmp_path / "link.jsonl").symlink_to(run / "heldout.jsonl")
    for changed in (
        {"data": str(run / "heldout.jsonl")},
        {"eval_data": str(run / "heldout.jsonl")},
        {"eval_data": str(tmp_path / "link.jsonl")},
        {"model": str(run / "adapter")},
    ):
        with pytest.raises(ConfigError, match=r"--overwrite would remove .*, which this run reads"):
            RunDirectory(run).check_free(replace(config, **changed))
    # What stays may be read: a merged model, for one, that lies in the directory.
    RunDirectory(run).check_free(replace(config, model=str(run / "merged.gguf")))


def test_places_where_no_directory_can_be_made(config: TrainConfig) -> None:
    for place in (f"{config.data}/run", f"{config.data}/a/b"):
        with pytest.raises(ConfigError, match=r"no directory can be made in .*rows\.jsonl"):
            RunDirectory(place).check_free(config)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_a_place_that_may_not_be_written(config: TrainConfig, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="no directory can be made in"):
        RunDirectory(locked / "run").check_free(config)


def test_only_an_unfinished_run_is_gone_on_with(config: TrainConfig, held_out: list[Example], tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MissingFileError, match="is not a run, so it cannot be resumed"):
            RunDirectory(place).check_resumable()
    directory = begin(config, held_out)
    directory.check_resumable()
    (directory.path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="is complete, so there is nothing to resume"):
        directory.check_resumable()


def test_going_on_needs_the_same_settings(config: TrainConfig, tmp_path: Path) -> None:
    directory = begin(config, [])
    base = Path(config.model)
    directory.check_same(config, base)
    directory.check_same(replace(config, overwrite=False), base)
    for changed, complaint in (
        ({"rank": 8}, "where rank is 16, not 8; leave out --rank"),
        ({"learning_rate": 1e-3}, "where learning_rate is 0.0026, not 0.001; leave out --learning-rate"),
        ({"steps": 5}, "where steps is 4, not 5"),
        ({"max_length": 9}, "where max_length is None, not 9"),
        ({"eval_data": write_rows(tmp_path / "other.jsonl", 3)}, "its eval data changed since it began"),
        ({"data": write_rows(tmp_path / "longer.jsonl", 5)}, "its data changed since it began"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            directory.check_same(replace(config, **changed), base)
    # The same rows elsewhere are the same data, and what a step keeps changes no bit.
    directory.check_same(replace(config, memory="lowest"), base)
    directory.check_same(replace(config, data=write_rows(tmp_path / "copy.jsonl", 4)), base)
    base.write_bytes(b"other bytes")
    with pytest.raises(ConfigError, match="its base changed since it began"):
        directory.check_same(config, base)


def test_rewinding_forgets_what_happens_again(config: TrainConfig) -> None:
    directory = begin(config, [])
    directory.record_evaluation(0, METRICS)
    for step in range(1, 5):
        directory.record({"step": step, "loss": 1.0 / step})
        directory.record_evaluation(step, replace(METRICS, tokens=step))

    def left() -> list[str]:
        return [f"{record['step']}{'e' * ('eval_loss' in record)}" for record in directory.records()[1:]]

    assert directory.evaluation_at(3) == replace(METRICS, tokens=3)
    assert directory.evaluation_at(0) == METRICS
    # The evaluation after the last step is made at the end of every run, also of one that only needs its end.
    directory.rewind(4, last_step=4)
    assert left() == ["0e", "1", "1e", "2", "2e", "3", "3e", "4"]
    directory.rewind(2, last_step=4)
    assert left() == ["0e", "1", "1e", "2", "2e"]
    assert directory.evaluation_at(3) is None
    directory.record_evaluation(2, None)
    assert left() == ["0e", "1", "1e", "2", "2e"]


def test_a_line_that_was_cut_off_is_passed_over(config: TrainConfig) -> None:
    directory = begin(config, [])
    directory.record({"step": 1, "loss": 2.0})
    with directory.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert directory.records()[-1] == {"step": 1, "loss": 2.0}
    directory.rewind(1, last_step=4)
    directory.record({"step": 2, "loss": 1.5})
    lines = directory.metrics.read_text().splitlines()
    assert [json.loads(line).get("loss") for line in lines] == [None, 2.0, 1.5]


def test_a_full_disk_leaves_no_beginning_of_a_run(config: TrainConfig, held_out: list[Example]) -> None:
    resource = pytest.importorskip("resource", reason="no limit on the size of files to stand for a full disk")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first lines of metrics.jsonl fit, the held-out rows do not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (220, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            begin(config, held_out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Path(str(config.output)).iterdir()) == []
    begin(config, held_out).check_resumable()
