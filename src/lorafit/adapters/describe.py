"""What can be said of adapters without their base: their settings, what their updates do, how two of them compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.adapters.peft import CONFIG_FILE, read_note
from lorafit.adapters.updates import Adapter, Update, in_order
from lorafit.errors import AdapterError


@dataclass(frozen=True)
class LayerFacts:
    """One update.

    Attributes:
        layer: Full name.
        shape: Of the weight.
        rank: Of the update.
        scale: The factor s before B A.
        norm: Frobenius norm of the update.
        largest: Its largest singular value: by how much it can lengthen an input.
    """

    layer: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    norm: float
    largest: float


@dataclass(frozen=True)
class LayerDifference:
    """The updates of one layer in two adapters; one that an adapter lacks is zero.

    Attributes:
        layer: Full name.
        norms: Frobenius norms of both.
        distance: Frobenius norm of their difference, relative to the norm of the first; None where that is zero.
        cosine: Of the angle between them; None where one of them is zero.
    """

    layer: str
    norms: tuple[float, float]
    distance: float | None
    cosine: float | None


@dataclass(frozen=True)
class Difference:
    """How two adapters differ.

    Attributes:
        settings: Name of a setting -> its values in both, where they differ.
        layers: Layer by layer.
        overall: All layers as one vector.
    """

    settings: Mapping[str, tuple[Any, Any]]
    layers: list[LayerDifference]
    overall: LayerDifference


def find_adapters(folder: str | Path) -> list[Path]:
    """Adapters in a folder, sorted: runs, adapters alone, and what is one folder further in."""
    folder = Path(folder)
    found = {path.parent for start in ("", "*/", "*/*/") for path in folder.glob(f"{start}{CONFIG_FILE}")}
    return sorted({path.parent if path.name == "adapter" else path for path in found})


def describe(adapter: Adapter) -> dict[str, Any]:
    """The facts of an adapter: base, method, settings, size, and what it was combined from."""
    record, layers = adapter.record, adapter.updates.values()
    note = read_note(adapter.path)
    settings = asdict(record.config)
    return {
        "path": str(adapter.path),
        "base": record.base,
        "base_sha256": record.base_sha256,
        "base_tensors_sha256": record.base_tensors_sha256,
        "quantize": record.quantize,
        "method": record.config.method,
        **settings,
        "ranks": sorted({update.rank for update in layers}),
        "scales": sorted({update.scale for update in layers}),
        "layers": len(adapter.updates),
        "parameters": sum(update.parameters for update in layers),
        "others": list(adapter.others),
        "bytes": sum(file.stat().st_size for file in adapter.path.iterdir() if file.is_file()),
        "written_by": "PEFT" if note is None else "lorafit",
        "combined": (note or {}).get("combined"),
    }


def layer_facts(adapter: Adapter) -> list[LayerFacts]:
    """Each update with its size."""
    facts = []
    for name, update in adapter.updates.items():
        values = update.singular_values()
        norm, largest = float(values.norm()), float(values.amax())
        facts.append(LayerFacts(name, update.shape, update.rank, update.scale, norm, largest))
    return facts


def compare(one: Adapter, two: Adapter) -> Difference:
    """How two adapters of one model differ.

    Raises:
        AdapterError: Their layers have different shapes.
    """
    # Sums of squares and of products: of the first, the second, their difference, both.
    total = [0.0, 0.0, 0.0, 0.0]
    layers = []
    for name in sorted(one.updates.keys() | two.updates.keys(), key=in_order):
        parts = _compare_layer(name, one.updates.get(name), two.updates.get(name))
        total = [a + b for a, b in zip(total, parts, strict=True)]
        layers.append(_difference(name, *parts))
    first, second = describe(one), describe(two)
    differing = {}
    # A method lacks settings that another has; lacking one and leaving it empty or off are the same.
    for name in [name for name in {**first, **second} if name not in ("path", "bytes")]:
        values = first.get(name), second.get(name)
        if values[0] != values[1] and any(values):
            differing[name] = values
    return Difference(differing, layers, _difference("all", *total))


def _compare_layer(name: str, one: Update | None, two: Update | None) -> tuple[float, float, float, float]:
    if one is None or two is None:
        squares = [0.0 if update is None else update.norm() ** 2 for update in (one, two)]
        return squares[0], squares[1], sum(squares), 0.0
    if one.shape != two.shape:
        raise AdapterError(f"{name} is {list(one.shape)} in one adapter and {list(two.shape)} in the other")
    return one.norm() ** 2, two.norm() ** 2, one.distance(two) ** 2, one.inner(two)


def _difference(name: str, first: float, second: float, between: float, both: float) -> LayerDifference:
    norms = math.sqrt(first), math.sqrt(second)
    distance = math.sqrt(between) / norms[0] if norms[0] else None
    # Rounding takes the cosine of equal updates just past 1.
    cosine = min(max(both / (norms[0] * norms[1]), -1.0), 1.0) if norms[0] and norms[1] else None
    return LayerDifference(name, norms, distance, cosine)
