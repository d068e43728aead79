"""A step is one step however it is split, the same seed gives the same bits, and a bad number stops everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.config import AdapterConfig, LoRA, QALoRA, TrainConfig
from lorafit.data.packing import Batch, split_passes
from lorafit.errors import TrainingError
from lorafit.evaluation.loss import evaluate
from lorafit.models.load import load_base
from lorafit.modules import PackedWeight, adapter_modules, attach
from lorafit.modules.qalora import offsets_held
from lorafit.objectives.sft import sft_loss
from lorafit.training.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint
from lorafit.training.loop import Loss, Trainer
from tests.oracles.adapted import documents, fill
from tests.oracles.tiny_gguf import write_tiny_llama

DOCUMENTS = documents([30, 12, 25, 40, 9, 33, 18, 21, 14, 28])
METHODS = [
    LoRA(rank=4),
    LoRA(rank=4, dropout=0.2),
    LoRA(rank=4, dropout=0.2, dora=True, modules_to_save=["norm"], trainable_token_indices={"embed_tokens": [40, 41]}),
    QALoRA(rank=4),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", hidden=128, layers=1).path


def trainer(
    path: Path, adapter: AdapterConfig, loss: Loss = sft_loss, compute: Any = "fp32", **settings: Any
) -> Trainer:
    model = load_base(path, compute=compute).model
    settings = {"learning_rate": 0.01, "steps": 6, "batch_size": 4, "seed": 1} | settings
    config = TrainConfig("tiny", "rows.jsonl", **settings)
    torch.manual_seed(config.seed)
    attach(model, adapter)
    return Trainer(model, loss, config)


def trained(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", METHODS)
def test_the_loss_falls(path: Path, adapter: AdapterConfig, compute: str) -> None:
    run = trainer(path, adapter, compute=compute, steps=30, batch_size=10)
    held = split_passes(DOCUMENTS, 1000)
    before = evaluate(run.model, held)
    steps = list(run.steps(DOCUMENTS))
    assert [step.step for step in steps] == list(range(1, 31))
    assert {step.tokens for step in steps} == {sum(len(d.tokens) for d in DOCUMENTS)}
    assert {step.trained_tokens for step in steps} == {before.tokens}
    if not getattr(adapter, "dropout", 0.0):
        # Before the first update a step's loss is the base's, the mean over all targets: the same sum in float32.
        assert steps[0].loss == pytest.approx(before.loss, rel=1e-6)
    # Ten random documents are learnt by heart: 8.2 nats to begin with, measured 0.03 to 0.3 at the end.
    assert evaluate(run.model, held).loss < 1.0


@pytest.mark.parametrize("adapter", METHODS)
def test_the_same_seed_gives_the_same_bits(path: Path, adapter: AdapterConfig) -> None:
    runs = []
    for seed in (1, 1, 2):
        run = trainer(path, adapter, seed=seed)
        losses = [step.loss for step in run.steps(DOCUMENTS)]
        runs.append((losses, trained(run)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize("adapter", [LoRA(rank=4), QALoRA(rank=4)])
def test_a_split_step_has_the_gradient_of_the_whole_one(path: Path, adapter: AdapterConfig) -> None:
    found = []
    for pass_tokens in (10_000, 50, 1):
        run = trainer(path, adapter, max_grad_norm=0.0)
        fill(run.model)
        batches = split_passes(DOCUMENTS, pass_tokens)
        step = run.step(batches)
        grads = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
        found.append((len(batches), step, grads))
    assert [count for count, *_ in found] == [1, 6, 10]
    _, whole, expected = found[0]
    for _, step, grads in found[1:]:
        # float32 sums over 230 tokens, in another order.
        assert step.loss == pytest.approx(whole.loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()))


def test_the_base_does_not_change(path: Path) -> None:
    for adapter in METHODS:
        run = trainer(path, adapter)
        blocks = {n: m.blocks.clone() for n, m in run.model.named_modules() if isinstance(m, PackedWeight)}
        frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if not p.requires_grad}
        before = trained(run)
        list(run.steps(DOCUMENTS))
        after = trained(run)
        assert all(not torch.equal(before[name], after[name]) for name in before)  # every adapter learnt
        for name, parameter in run.model.named_parameters():
            assert parameter.requires_grad == (name in before)
            if name in frozen:
                assert parameter.grad is None
                assert torch.equal(parameter, frozen[name])
        for name, module in run.model.named_modules():
            if isinstance(module, PackedWeight):
                assert torch.equal(module.blocks, blocks[name])


def failing(step: int, factor: float) -> Loss:
    """The loss, but in the pass ``step`` multiplied by something that is no number."""
    passes = []

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        passes.append(batch)
        return sft_loss(model, batch) * (factor if len(passes) == step else 1.0)

    return loss


def gradient_of_infinity(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A finite loss, but the root's slope at zero is not."""
    b = next(iter(adapter_modules(model).values())).adapter_parameters()["lora_B"]
    return sft_loss(model, batch) + (b * 0.0).sum().sqrt()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(
    path: Path, tmp_path: Path, factor: float
) -> None:
    run = trainer(path, LoRA(rank=4, dropout=0.2), failing(5, factor), pass_tokens=70, batch_size=4)
    iterator = run.steps(DOCUMENTS)
    for _ in range(2):  # two passes each
        next(iterator)
        save_checkpoint(run, tmp_path)
    before = trained(run)
    with pytest.raises(
        TrainingError, match=rf"the loss is {factor} in step 3, on rows.jsonl:\d+, .*nothing .* was kept"
    ):
        next(iterator)
    assert run.done == 2
    assert equal(trained(run), before)
    assert last_checkpoint(tmp_path).name == "step-2"

    # What the bad step left behind does not reach the next one: going on equals never having failed.
    list(run.steps(DOCUMENTS))
    unharmed = trainer(path, LoRA(rank=4, dropout=0.2), pass_tokens=70, batch_size=4)
    list(unharmed.steps(DOCUMENTS))
    assert equal(trained(run), trained(unharmed))
    resumed = trainer(path, LoRA(rank=4, dropout=0.2), pass_tokens=70, batch_size=4)
    restore_checkpoint(resumed, last_checkpoint(tmp_path))
    assert equal(trained(resumed), before)


def test_a_gradient_that_is_no_number_stops_the_run(path: Path) -> None:
    run = trainer(path, LoRA(rank=4), gradient_of_infinity)
    before = trained(run)
    with pytest.raises(TrainingError, match=r"the gradient norm is nan in step 1, on rows\.jsonl:"):
        next(run.steps(DOCUMENTS))
    assert run.done == 0
    assert equal(trained(run), before)


def test_adapters_that_the_loss_does_not_reach_are_named(path: Path) -> None:
    def detached(model: PreTrainedModel, batch: Batch) -> Tensor:
        for name, module in adapter_modules(model).items():
            module.enabled = not name.endswith("up_proj")
        return sft_loss(model, batch)

    run = trainer(path, QALoRA(rank=4), detached)
    with pytest.raises(TrainingError, match=r"1 adapters had no gradient .*: model\.layers\.0\.mlp\.up_proj;"):
        next(run.steps(DOCUMENTS))


def test_the_schedule_and_clipping_act(path: Path) -> None:
    run = trainer(path, LoRA(rank=4), steps=4, warmup=0.5, decay="linear", learning_rate=0.02)
    assert [step.learning_rate for step in run.steps(DOCUMENTS)] == pytest.approx([0.01, 0.02, 0.02, 0.01])

    norms = []
    for limit in (1e-3, 0.0):
        run = trainer(path, LoRA(rank=4), max_grad_norm=limit)
        step = next(run.steps(DOCUMENTS))
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append((step.grad_norm, float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())))
    assert norms[0][0] == norms[1][0] == pytest.approx(norms[1][1])
    assert norms[0][1] == pytest.approx(1e-3, rel=1e-4)


def test_offsets_held_before_do_not_keep_a_model_from_learning(path: Path) -> None:
    run = trainer(path, QALoRA(rank=4), steps=15, batch_size=10)
    run.model.eval()
    with offsets_held(run.model):
        losses = [step.loss for step in run.steps(DOCUMENTS)]
    assert losses[-1] < losses[0] - 0.1


def test_an_evaluation_in_between_changes_nothing(path: Path) -> None:
    results = []
    for every in (0, 2):
        run = trainer(path, LoRA(rank=4, dropout=0.2))
        for step in run.steps(DOCUMENTS):
            if every and step.step % every == 0:
                evaluate(run.model, split_passes(DOCUMENTS, 100))
                torch.rand(3)  # and whatever else draws random numbers
        results.append(trained(run))
    assert equal(*results)
