"""Every option acts or is refused by name, and what is left open is decided the same way every time."""

import dataclasses
from pathlib import Path

import pytest

from lorafit.config import LoRA, QALoRA, TrainConfig
from lorafit.data.chat import Document
from lorafit.errors import ConfigError, DataError, MissingFileError
from lorafit.models.base import Base
from lorafit.models.load import load_base
from lorafit.training import setup
from lorafit.training.setup import Data, Rows
from tests.oracles.tiny_gguf import write_tiny_llama
from tests.training.rows import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("setup")
    write_rows(path / "rows.jsonl", 60)
    write_rows(path / "more.jsonl", 20, first=50)
    write_tiny_llama(path / "tiny.gguf", layers=1, context=128)
    write_tiny_llama(path / "eight.gguf", layers=1, context=128, format="Q8_0")
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Base:
    return load_base(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def eight(folder: Path) -> Base:
    return load_base(folder / "eight.gguf")


def config(folder: Path, **settings: object) -> TrainConfig:
    return TrainConfig(str(folder / "tiny.gguf"), str(folder / "rows.jsonl"), **{"rank": 2, **settings})  # type: ignore[arg-type]


def encoded(config: TrainConfig, base: Base) -> Data:
    return setup.encode_rows(setup.read_rows(config), config, base.model, base.tokenizer)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"method": "dora"}, "--method is dora, but must be one of lora, qalora"),
        ({"scaling": "half"}, "--scaling is half, but must be one of standard, rslora, plain"),
        ({"memory": "medium"}, "--memory is medium, but must be one of auto, high, low, lowest"),
        ({"decay": "fast"}, "--decay is fast, but must be one of cosine, linear, constant"),
        ({"compute": "fp16"}, "--compute is fp16, but must be one of auto, bf16, fp32"),
        ({"rank": 0}, "rank is 0, but must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0, but must be a positive number"),
        ({"method": "lora", "dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0, but must be above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"epochs": -1.0}, "--epochs is -1.0, but must be above 0"),
        ({"epochs": float("inf")}, "--epochs is inf"),
        ({"steps": 0}, "--steps is 0, but must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        ({"pass_tokens": 0}, "--pass-tokens is 0, but must be at least 1"),
        ({"tokens_per_step": 0}, "--tokens-per-step is 0, but must be at least 1"),
        ({"batch_size": 8, "tokens_per_step": 500}, "--batch-size and --tokens-per-step exclude each other"),
        ({"max_length": 1}, "--max-length is 1, but must be at least 2"),
        ({"warmup": 1.5}, "--warmup is 1.5, but is a share of the steps"),
        ({"warmup": -0.1}, "--warmup is -0.1"),
        ({"weight_decay": float("nan")}, "--weight-decay is nan"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm is -1.0, but must be at least 0"),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        ({"seed": 2**64}, f"--seed is {2**64}, but must be at most"),
        ({"eval_every": -1}, "--eval-every is -1"),
        ({"checkpoint_every": -1}, "--checkpoint-every is -1"),
        ({"samples": -1}, "--samples is -1"),
        ({"steps": 3, "epochs": 1.0}, "--steps and --epochs exclude each other"),
        ({"no_eval": True, "eval_data": "more.jsonl"}, "--no-eval and --eval-data exclude each other"),
        ({"no_eval": True, "eval_every": 2}, "--eval-every 2 has no effect with --no-eval"),
        ({"no_eval": True, "samples": 2}, "--samples 2 has no effect with --no-eval"),
        ({"truncate": True}, "--truncate needs --max-length"),
        ({"method": "lora", "frozen_tensors": "lora"}, "--frozen-tensors lora has no effect with --method lora"),
        ({"frozen_tensors": "warm"}, "--frozen-tensors is warm, but must be one of frozen, lora"),
        ({"method": "qalora", "dropout": 0.1}, "--dropout 0.1 has no effect with --method qalora"),
        ({"method": "qalora", "scaling": "rslora"}, "--scaling rslora has no effect with --method qalora"),
    ],
)
def test_options_out_of_range_or_without_effect(folder: Path, settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setup.check_options(config(folder, **settings))
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 0.5, "warmup": 0.0, "max_grad_norm": 0.0, "seed": 2**63 - 1},
        {"method": "lora", "scaling": "plain", "dropout": 0.5, "warmup": 1.0, "decay": "constant"},
        {"method": "qalora", "samples": 0, "eval_every": 2, "checkpoint_every": 1, "steps": 3},
        {"truncate": True, "max_length": 2, "no_eval": True, "batch_size": 1, "pass_tokens": 1},
    ],
)
def test_options_at_the_border_are_taken(folder: Path, settings: dict[str, object]) -> None:
    setup.check_options(config(folder, **settings))


def test_a_run_is_no_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match="is a run, but training starts from a base"):
        setup.check_options(dataclasses.replace(config(folder), model=str(tmp_path)))


def test_rows_are_held_out_as_asked(folder: Path) -> None:
    def places(rows: Rows) -> tuple[list[str], list[str]]:
        return tuple([row.source.rsplit("/", 1)[-1] for row in part] for part in (rows.training, rows.held_out))

    everything = [f"rows.jsonl:{line}" for line in range(1, 61)]
    training, held_out = places(setup.read_rows(config(folder)))
    assert len(held_out) == 16
    assert sorted(training + held_out) == sorted(everything)
    assert places(setup.read_rows(config(folder, seed=5))) == (training, held_out)
    assert places(setup.read_rows(config(folder, no_eval=True))) == (everything, [])
    other = setup.read_rows(config(folder, eval_data=str(folder / "more.jsonl")))
    assert places(other) == (everything, [f"more.jsonl:{line}" for line in range(1, 21)])
    # Rows 50 to 59 are in both files.
    assert other.both() == 10
    assert setup.read_rows(config(folder)).both() == 0


def test_data_that_would_measure_nothing_or_are_no_data(folder: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", 5)
    (tmp_path / "link.jsonl").symlink_to(folder / "rows.jsonl")
    for settings, kind, complaint in (
        ({"data": str(folder / "tiny.gguf")}, ConfigError, "is a model, but DATA is wanted there"),
        ({"eval_data": str(folder / "rows.jsonl")}, ConfigError, "is the training data"),
        ({"eval_data": str(tmp_path / "link.jsonl")}, ConfigError, "is the training data"),
        ({"eval_data": str(tmp_path / "none.jsonl")}, MissingFileError, "no data file"),
        ({"data": few}, DataError, "5 rows are too few to hold 16 out; give --eval-data FILE, or --no-eval"),
    ):
        with pytest.raises(kind, match=complaint):
            setup.read_rows(dataclasses.replace(config(folder), **settings))


def test_what_is_left_open_is_decided_by_model_and_data(folder: Path, tiny: Base, eight: Base) -> None:
    asked = config(folder)
    data = encoded(asked, tiny)
    resolved = setup.resolve(asked, tiny.model, data)
    # 44 rows by 8; 1.5 / 64 = 0.0234, twice that for QA-LoRA, in two digits.
    assert (resolved.method, resolved.steps, resolved.learning_rate) == ("qalora", 6, 0.047)
    assert (resolved.batch_size, resolved.tokens_per_step) == (8, None)
    assert resolved.output == "runs/tiny-qalora"
    assert setup.resolve(resolved, tiny.model, data) == resolved, "resolving twice changes nothing"
    plain = setup.resolve(asked, eight.model, data)
    assert (plain.method, plain.learning_rate) == ("lora", 0.023)
    asked = config(folder, method="lora", learning_rate=1e-3, epochs=2.0, batch_size=3, output="here")
    resolved = setup.resolve(asked, tiny.model, data)
    assert resolved == dataclasses.replace(asked, epochs=None, steps=30)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tokens_per_step": 99_999}, "--tokens-per-step is 99999, but all rows have "),
        ({"batch_size": 45}, "--batch-size is 45, but rows to train on number 44; give that or less"),
        ({"samples": 17}, "--samples 17 has no effect beyond the 16 rows that are held out"),
        ({"eval_every": 6}, "--eval-every 6 has no effect in a run of 6 steps"),
        ({"checkpoint_every": 9, "steps": 9}, "--checkpoint-every 9 has no effect in a run of 9 steps"),
        # The method is chosen by the base, and only then is it known that these do nothing.
        ({"dropout": 0.1}, "--dropout 0.1 has no effect with --method qalora"),
    ],
)
def test_options_without_effect_on_this_run(
    folder: Path, tiny: Base, settings: dict[str, object], complaint: str
) -> None:
    asked = config(folder, **settings)
    with pytest.raises(ConfigError) as caught:
        setup.resolve(asked, tiny.model, encoded(asked, tiny))
    assert str(caught.value).startswith(complaint)


def test_a_few_held_out_rows_are_enough_for_the_default_number_of_samples(
    folder: Path, tiny: Base, tmp_path: Path
) -> None:
    asked = config(folder, eval_data=write_rows(tmp_path / "one.jsonl", 1, first=70))
    assert setup.resolve(asked, tiny.model, encoded(asked, tiny)).samples == 3


def test_a_budget_of_tokens_makes_steps_of_its_own(folder: Path, tiny: Base) -> None:
    asked = config(folder, tokens_per_step=200, epochs=2.0)
    data = encoded(asked, tiny)
    resolved = setup.resolve(asked, tiny.model, data)
    assert (resolved.batch_size, resolved.tokens_per_step) == (None, 200)
    lengths = [len(document.tokens) for document in data.training]
    assert resolved.steps is not None
    # Steps are filled, so that two and the next one's first row always exceed the budget.
    assert 2 * sum(lengths) / 200 <= resolved.steps < 2 * (2 * sum(lengths) / 200 + 1)
    assert setup.resolve(resolved, tiny.model, data) == resolved
    longest = max(lengths)
    setup.resolve(config(folder, tokens_per_step=longest), tiny.model, data)
    place = data.training[lengths.index(longest)].source
    with pytest.raises(DataError) as caught:
        setup.resolve(config(folder, tokens_per_step=longest - 1), tiny.model, data)
    assert str(caught.value).startswith(f"{place}: {longest} tokens, but a step takes at most {longest - 1}")
    with pytest.raises(DataError, match=r"a step takes at most 20 \(44 rows are larger\); raise --tokens-per-step, "):
        setup.resolve(config(folder, tokens_per_step=20), tiny.model, data)


def test_the_context_limits_the_length(folder: Path, tiny: Base) -> None:
    asked = config(folder, max_length=129)
    rows = setup.read_rows(asked)
    with pytest.raises(ConfigError, match="--max-length is 129, but the model's context is 128"):
        setup.encode_rows(rows, asked, tiny.model, tiny.tokenizer)
    whole = setup.encode_rows(rows, config(folder), tiny.model, tiny.tokenizer)
    assert [document.source for document in whole.training] == [row.source for row in rows.training]
    assert [document.source for document in whole.held_out] == [row.source for row in rows.held_out]
    longest = max(len(document.tokens) for document in whole.training + whole.held_out)
    at_most = config(folder, max_length=longest)
    assert setup.encode_rows(rows, at_most, tiny.model, tiny.tokenizer) == whole
    with pytest.raises(DataError, match=rf"rows.jsonl:\d+: {longest} tokens, but at most {longest - 1} fit"):
        setup.encode_rows(rows, config(folder, max_length=longest - 1), tiny.model, tiny.tokenizer)


def test_cutting_keeps_the_beginning_and_something_to_train() -> None:
    short = Document([1, 2], [False, True], "d:1")
    long = Document([1, 2, 3, 4], [False, False, True, True], "d:2")
    assert setup.fit_length([short, long], 3, truncate=True) == [
        short,
        Document([1, 2, 3], [False, False, True], "d:2"),
    ]
    with pytest.raises(DataError, match=r"d:2: nothing of its answer is left after --truncate"):
        setup.fit_length([short, long], 2, truncate=True)
    with pytest.raises(DataError, match=r"d:2: 4 tokens, but at most 3 fit; .*--truncate --max-length 3"):
        setup.fit_length([short, long], 3, truncate=False)
    with pytest.raises(DataError, match=r"\(2 rows are too long\)"):
        setup.fit_length([long, long], 3, truncate=False)


def test_the_adapter_gets_the_settings_of_its_method(folder: Path) -> None:
    asked = config(folder, alpha=4.0, scaling="rslora", dropout=0.1, targets="q_proj")
    assert setup.adapter_config(asked, "lora") == LoRA(
        rank=2, alpha=4.0, scaling="rslora", dropout=0.1, targets="q_proj"
    )
    asked = config(folder, alpha=4.0, targets="q_proj")
    assert setup.adapter_config(asked, "qalora") == QALoRA(rank=2, alpha=4.0, targets="q_proj")


def test_files_may_be_named_by_paths() -> None:
    names = {"model": "m.gguf", "data": "d.jsonl", "output": "runs/x", "adapter": "a", "eval_data": "e.jsonl"}
    assert TrainConfig(**{key: Path(name) for key, name in names.items()}) == TrainConfig(**names)  # type: ignore[arg-type]
