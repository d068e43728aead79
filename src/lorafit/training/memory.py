"""How much memory training may use, how much is free, and how much this process has used at most.

A backward pass needs what the forward pass computed. ``high`` keeps it, but for what costs next to nothing to compute
again. ``lowest`` keeps the input of each decoder layer only and computes the layer once more when its turn comes in the
backward pass (arXiv 1604.06174): memory for the activations of one layer instead of all, for about a third more work.
``low`` computes both factors of the gated product again, which are half of all that is kept; where a layer is not
computed as one (``models.fuse``), every second layer as a whole. benchmarks/NOTES.md says what that costs.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.config import MemoryLevel
from lorafit.models.fuse import PlainLayer


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process, mapped files included; None where the system does not tell (Windows)."""
    try:
        # Not by getrusage, which on Linux starts from the peak of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def keep_activations(model: PreTrainedModel, level: MemoryLevel) -> None:
    """Set what a training step keeps for its backward pass; the gradients are the same, to the bit.

    Args:
        model: The model, whose decoder layers are those of transformers.
        level: ``high`` keeps most, ``low`` about half of that, ``lowest`` of every layer its input.
    """
    again = partial(checkpoint, use_reentrant=False)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Not by the model's own switch, which also asks for the gradient of the embeddings that nothing needs.
    for number, layer in enumerate(layers):
        every_second = level == "low" and number % 2 == 1
        if isinstance(layer, PlainLayer):
            layer.keeps_less, every_second = level == "low", False
        layer.gradient_checkpointing = level == "lowest" or every_second
        layer._gradient_checkpointing_func = again  # type: ignore[assignment]  # mypy takes it for a module


class Free(NamedTuple):
    """Memory that this process may still take.

    Attributes:
        nbytes: How much; None where nothing tells.
        source: What told it, for people.
    """

    nbytes: int | None
    source: str


def free_memory(device: torch.device, root: Path = Path("/")) -> Free:
    """What is free on a device: on Linux the least of what the system has and the control groups allow.

    Args:
        device: Where the model computes.
        root: Where the system's files are.
    """
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], "on the GPU")
    told = [Free(limit, "under the limit of the control group") for limit in _group_limits(root)]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        told += [Free(int(line.split()[1]) * 1024, "") for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    if not told:
        try:
            told = [Free(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "")]
        except (AttributeError, OSError, ValueError):
            return Free(None, "this system does not say how much is free, so plenty is assumed")
    return min(told, key=lambda free: free.nbytes or 0)


def _group_limits(root: Path) -> list[int]:
    """What each control group of this process, and each above it, has left; of version 1 and 2."""
    left = []
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = mount / path.lstrip("/")
        # A container may see its own group as the mount itself, whatever the path says.
        for folder in {place, *place.parents, mount}:
            if folder.is_relative_to(mount):
                left += _left_in(folder, *names)
    return left


def _left_in(folder: Path, limit: str, usage: str) -> list[int]:
    """Limit less usage, where pages of files that have not been used for a while count as free; none without limit."""
    try:
        bytes_ = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group; or its limit is "max"
        return []
    reclaimable = [
        int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "total_inactive_file")
    ]
    return [max(bytes_ - used + max(reclaimable, default=0), 0)]
