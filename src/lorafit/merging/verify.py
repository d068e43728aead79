"""Reading a merged file side by side with its base: every byte is accounted for.

What lies before the tensor data must be the base's but for formats and places in the tensor table; every tensor without
a change must be the base's; what a changed tensor may differ in, its change says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lorafit.containers.gguf_writer import new_gap, new_head, new_table, read_gap, read_head, read_rows
from lorafit.errors import ContainerError, FormatError, MergeError
from lorafit.merging.exact import differing
from lorafit.merging.plan import Plan


@dataclass(frozen=True)
class Comparison:
    """A merged file that is the base but for the trained tensors.

    Attributes:
        sha256: Its hash.
        size: Its bytes.
        base_size: The bytes of the base.
        bytes_changed: How many bytes of offsets differ from the base's.
    """

    sha256: str
    size: int
    base_size: int
    bytes_changed: int


def verify(plan: Plan, written: str | Path) -> Comparison:
    """Compare a merged file with the base, reading both side by side.

    Args:
        plan: What should have been written.
        written: The merged file.

    Raises:
        MergeError: A byte is neither the base's nor what the plan says.
    """
    source, changes = plan.file, {change.tensor.name: change for change in plan.changes}
    tensors = new_table(source, changes)
    changed = wrong = elsewhere = 0
    with plan.base.path.open("rb") as base, Path(written).open("rb") as merged:
        old, new = _Hashed(base), _Hashed(merged)
        head = read_head(source, old)
        elsewhere += _differing(new_head(source, head, tensors), new.read(len(head)))
        for info in source.tensors.values():
            moved, change = tensors[info.name], changes.get(info.name)
            try:
                for (start, before), (_, after) in zip(read_rows(old, info), read_rows(new, moved), strict=True):
                    if change is None:
                        elsewhere += differing(before, after)
                    else:
                        counts = change.compare(start, before, after)
                        changed, wrong, elsewhere = changed + counts[0], wrong + counts[1], elsewhere + counts[2]
            except (ContainerError, FormatError) as error:
                raise MergeError(f"{written} cannot be compared with {plan.base.path}: {error}") from None
            gap = new_gap(source, read_gap(source, old, info), info, moved)
            elsewhere += _differing(gap, new.read(len(gap)))
        elsewhere += len(new.read(-1))
    if elsewhere or wrong or old.digest.hexdigest() != plan.base_sha256:
        raise MergeError(
            f"{written} is not the base with the trained offsets ({wrong:,} bytes of offsets and {elsewhere:,} others "
            f"are wrong): check the disk, and that nothing else writes to {plan.base.path}"
        )
    return Comparison(new.digest.hexdigest(), new.size, old.size, changed)


class _Hashed:
    """A file that is hashed and counted as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes, or fewer at the end; all that are left for -1."""
        data = self.file.read(count)
        self.digest.update(data)
        self.size += len(data)
        return data


def _differing(one: bytes, other: bytes) -> int:
    common = min(len(one), len(other))
    arrays = (np.frombuffer(data[:common], np.uint8) for data in (one, other))
    return int(np.not_equal(*arrays).sum()) + max(len(one), len(other)) - common
