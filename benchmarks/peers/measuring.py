"""What both tools' measurements have in common; nothing but the standard library, since it runs in both environments.

A plan is a JSON list of steps, a step a list of documents, a document its tokens and which of them are trained. Both
tools get the same plan, so that rows, batches, their order, and tokens are the same.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not counted

Plan = list[list[dict[str, Any]]]


def read_plan(path: Path) -> Plan:
    """The steps of a plan."""
    plan: Plan = json.loads(path.read_text())
    return plan


def peak_resident_bytes() -> int:
    """The most memory that this process had in RAM at once, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not by getrusage, which on Linux starts from the peak of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_result(path: Path, **figures: Any) -> None:
    """Leave figures for whoever started this process; standard output belongs to the tools."""
    path.write_text(json.dumps(figures))
