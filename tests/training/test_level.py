"""Which memory level a run takes, and that what it is chosen by is close to what a step takes."""

from pathlib import Path

import pytest
import torch

from lorafit.config import AdapterConfig, Compute, LoRA, MemoryLevel, QALoRA
from lorafit.models.load import load_base
from lorafit.modules import attach
from lorafit.training.level import choose_level, estimate_step
from lorafit.training.memory import Free, free_memory
from tests.oracles.adapted import documents
from tests.oracles.memory import memory_of
from tests.oracles.tiny_gguf import write_tiny_llama

NEED: dict[MemoryLevel, int] = {"high": 600, "low": 400, "lowest": 100}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("free", "level"),
    [(10_000, "high"), (1000, "high"), (999, "low"), (667, "low"), (666, "lowest"), (1, "lowest"), (None, "high")],
)
def test_the_first_that_fits_into_three_fifths_of_what_is_free(free: int | None, level: MemoryLevel) -> None:
    chosen = choose_level("auto", NEED, 2048, Free(free, "under a limit"))
    assert (chosen.level, chosen.automatic, chosen.free_bytes) == (level, True, free)
    assert "a pass of 2,048 tokens is estimated to need 0.00 GB" in chosen.reason
    assert ("a smaller --pass-tokens" in chosen.reason) == (free == 1)
    assert ("high would need" in chosen.reason) == (level != "high" and free != 1)


def test_what_was_asked_for_is_taken() -> None:
    for level in NEED:
        chosen = choose_level(level, NEED, 2048, Free(1, ""))
        assert (chosen.level, chosen.automatic) == (level, False)
        assert chosen.reason.startswith("as asked; ")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


SYSTEM = {"proc/meminfo": "MemTotal: 16000 kB\nMemFree: 50 kB\nMemAvailable:    8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "nbytes"),
    [
        ({}, 8_192_000),
        # Version 2: the group has no limit, but the one above it has; pages of files that lie idle are free.
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "10\n",
                "sys/fs/cgroup/user/job/memory.stat": "anon 5\n",
                "sys/fs/cgroup/user/memory.max": "5000\n",
                "sys/fs/cgroup/user/memory.current": "3000\n",
                "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 700\nactive_file 90\n",
            },
            2700,
        ),
        # Version 1, in a container that sees its group as the mount itself.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            5500,
        ),
        # A limit that is above what the system has, as version 1 writes "none", and one that is used up.
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500\n",
            },
            8_192_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "1200\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 100\n",
            },
            0,
        ),
    ],
)
def test_the_least_of_what_the_system_has_and_its_groups_allow(
    tmp_path: Path, files: dict[str, str], nbytes: int
) -> None:
    write(tmp_path, SYSTEM | files)
    free = free_memory(CPU, tmp_path)
    assert free.nbytes == nbytes
    assert ("control group" in free.source) == (nbytes != 8_192_000)


def test_this_system_has_something_free() -> None:
    free = free_memory(CPU)
    assert free.nbytes is None or free.nbytes > 10_000_000


_SETUP = """
import torch
from lorafit.config import LoRA, QALoRA, TrainConfig
from lorafit.data.packing import split_passes
from lorafit.models.load import load_base
from lorafit.modules import attach
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Trainer
from tests.oracles.adapted import documents
model = load_base({path!r}, compute={compute!r}).model
attach(model, {adapter})
config = TrainConfig("", "", learning_rate=1e-4, steps=2, memory={level!r})
trainer = Trainer(model, sft_loss, config)
batches = split_passes(documents({lengths}), 10**6)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is from now on, not that of loading
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what one process took at most")
@pytest.mark.parametrize(
    ("name", "adapter", "level", "lengths"),
    [
        ("tiny", LoRA(rank=4), "high", [300] * 8),
        ("smollm2", QALoRA(rank=4), "lowest", [100] * 3),
    ],
)
def test_the_estimate_is_close_to_what_a_step_takes(
    name: str, adapter: AdapterConfig, level: MemoryLevel, lengths: list[int], tmp_path: Path, smollm2_path: Path
) -> None:
    path, compute = smollm2_path, torch.bfloat16
    if name == "tiny":
        path, compute = tmp_path / "tiny.gguf", torch.float32
        write_tiny_llama(path, hidden=256, intermediate=512, layers=6)
    kind: Compute = "bf16" if compute == torch.bfloat16 else "fp32"
    model = load_base(path, compute=kind).model
    attach(model, adapter)
    estimated = estimate_step(
        model,
        documents(lengths),
        itemsize=compute.itemsize,
        keeps_inputs=isinstance(adapter, LoRA),
    )
    assert sorted(estimated.values(), reverse=True) == [estimated[each] for each in ("high", "low", "lowest")]
    before = _SETUP.format(path=str(path), compute=kind, adapter=repr(adapter), level=level, lengths=lengths)
    measured = memory_of("trainer.step(batches)", before=before)
    # The allocator, code that is compiled in the step, and what a kernel of the processor needs differ by machine.
    assert 0.4 < estimated[level] / measured < 2.5
