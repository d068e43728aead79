"""``lorafit adapters``: which adapters there are, what is in them, how two differ, and several made into one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from lorafit.commands.console import Console, readable_bytes, readable_names
from lorafit.config import Combination
from lorafit.errors import AdapterError, ConfigError, LorafitError, MissingFileError, OutputExistsError

if TYPE_CHECKING:
    from lorafit.adapters.combine import Combined
    from lorafit.adapters.describe import LayerDifference
    from lorafit.adapters.updates import Adapter

adapters_command = App(name="adapters")

_HASH_SHOWN = 12  # digits; nobody compares more by eye


def combine(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    recipe: Combination | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Combined:
    """Combines adapters of one base and writes the result as an adapter in PEFT's layout.

    Args:
        adapters: Directories of adapters or runs.
        output: The directory to write.
        weights: A factor for each; 1 if missing.
        recipe: The method and its settings; the weighted sum if missing.
        base: What all of them were trained on, for those that do not say so by a hash.
        overwrite: Replace the output if it is an adapter.

    Returns:
        What was written.

    Raises:
        ConfigError: There are no adapters, or not one weight for each.
        OutputExistsError: The output exists, and ``overwrite`` is not set or it is no adapter.
        AdapterError: They were not trained on one base, or cannot be combined so.
        LorafitError: One cannot be read.
    """
    if not adapters:
        raise ConfigError("there is nothing to combine; name the directories of adapters or runs")
    target = Path(output)
    from lorafit.adapters import combine as combining
    from lorafit.adapters.updates import read_adapter
    from lorafit.containers.atomic import replacing_directory

    _check_free(target, overwrite)
    read = [read_adapter(path) for path in adapters]
    for adapter in read:
        if adapter.path.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"{output} holds {adapter.path}, which is combined; choose another --output")
    if base is not None:
        read = _vouched(read, base)
    record = combining.common_base(read)
    combined = combining.combine(read, [1.0] * len(read) if weights is None else weights, recipe or Combination())
    with replacing_directory(target) as written:
        combining.save_combined(combined, written, record)
    return combined


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "adapter_config.json").is_file():
        raise OutputExistsError(f"{target} exists and is no adapter, so it is not replaced; choose another --output")
    if not overwrite:
        raise OutputExistsError(f"{target} exists; choose another --output, or replace it with --overwrite")


def _vouched(adapters: Sequence[Adapter], base: str | Path) -> list[Adapter]:
    """The same adapters, of which those that do not know their base by its hash now do."""
    from lorafit.containers.atomic import fingerprint
    from lorafit.containers.identity import hash_tensors
    from lorafit.models.load import resolve
    from lorafit.models.pull import EMBEDDED

    if all(adapter.record.base_sha256 for adapter in adapters):
        raise ConfigError("--base has no effect: every adapter says by a hash what it was trained on; leave it out")
    path = resolve(base)
    name = str(base) if base in EMBEDDED else os.path.abspath(base)
    sha256, of_tensors = fingerprint(path), hash_tensors(path)
    result = []
    for adapter in adapters:
        if not adapter.record.fits(path):
            raise AdapterError(f"{adapter.path} was not trained on {base}, whose tensors have another hash")
        record = replace(adapter.record, base=name, base_sha256=sha256, base_tensors_sha256=of_tensors)
        result.append(replace(adapter, record=record))
    return result


@adapters_command.command(name="list")
def list_command(folder: str = "runs", /, *, json: bool = False) -> None:
    """List the adapters in a folder: those of runs, and directories in PEFT's layout.

    Args:
        folder: Where to look, up to two folders deep.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    from lorafit.adapters.describe import describe, find_adapters
    from lorafit.adapters.updates import read_adapter

    if not Path(folder).is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    console = Console(json=json)
    found: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    for path in find_adapters(folder):
        name = os.path.relpath(path, folder) if path != Path(folder) else path.name
        try:
            found.append({"name": name, **describe(read_adapter(path))})
        except LorafitError as error:
            broken[name] = str(error)
    columns = ["adapter", "base", "method", "rank", "scaling", "parameters", "bytes"]
    rows = [
        (each["name"], _base(each), _method(each), _spread(each["ranks"]), _spread(each["scales"]), each["parameters"],
         readable_bytes(each["bytes"])) for each in found
    ]  # fmt: skip
    if rows:
        console.table("", columns, rows)
    elif not broken:
        console.print(f"There are no adapters in {folder}.")
    for name, why in broken.items():
        console.print(f"{name} cannot be used: {why}")
    console.result({"adapters": found, "broken": broken})


@adapters_command.command(name="show")
def show_command(adapter: str, /, *, json: bool = False) -> None:
    """Show what an adapter is: base, settings, and the size of the update of each layer.

    Args:
        adapter: Directory of an adapter or a run.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    from lorafit.adapters.describe import describe, layer_facts
    from lorafit.adapters.updates import read_adapter

    console = Console(json=json)
    read = read_adapter(adapter)
    facts, layers = describe(read), layer_facts(read)
    shown = {name: value for name, value in facts.items() if value not in (None, "", [], {}, ())}
    shown["bytes"] = readable_bytes(facts["bytes"])
    if combined := shown.pop("combined", None):
        parts = " + ".join(f"{part['weight']:g} × {part['path']}" for part in combined["of"])
        shown["combined"] = f"by {combined['method']} from {parts}"
    for name in ("ranks", "scales"):
        shown[name] = ", ".join(f"{value:g}" for value in shown[name])
    if others := shown.get("others"):
        shown["others"] = readable_names(others)
    console.fields(adapter, shown)
    console.table(
        "\nUpdates, s·B A",
        ["layer", "shape", "rank", "scale s", "norm", "largest singular value"],
        [(f.layer, " × ".join(map(str, f.shape)), f.rank, f.scale, f.norm, f.largest) for f in layers],
    )
    norm = sum(each.norm**2 for each in layers) ** 0.5
    console.print(f"The norm of all together is {norm:.4g}.")
    if read.others:
        console.print("This is not all that the adapter does: the tensors named as others are not low-rank updates.")
    console.result({**facts, "norm": norm, "updates": [asdict(each) for each in layers]})


@adapters_command.command(name="diff")
def diff_command(one: str, two: str, /, *, json: bool = False) -> None:
    """Compare two adapters: their settings, and how far apart the updates of each layer are.

    Args:
        one: Directory of an adapter or a run.
        two: Directory of another.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    from lorafit.adapters.describe import compare
    from lorafit.adapters.updates import read_adapter

    console = Console(json=json)
    difference = compare(read_adapter(one), read_adapter(two))
    if difference.settings:
        rows = [
            (name, *(readable_names(each) if name == "others" else str(each) for each in values))
            for name, values in difference.settings.items()
        ]
        console.table("Settings that differ", ["setting", one, two], rows)
    else:
        console.print("No setting differs.")
    console.table(
        "Updates; the distance is relative to the first",
        ["layer", "norm of the first", "norm of the second", "distance", "cosine"],
        [_row(layer) for layer in (*difference.layers, difference.overall)],
    )
    console.result(
        {
            "settings": difference.settings,
            "layers": [asdict(layer) for layer in difference.layers],
            "overall": asdict(difference.overall),
        }
    )


@adapters_command.command(name="combine")
def combine_command(
    *adapters: str,
    output: str,
    weights: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    recipe: Annotated[Combination | None, Parameter(name="*")] = None,
    base: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Combine adapters of one base into a new one, in PEFT's layout.

    Args:
        adapters: Directories of adapters or runs.
        output: The directory to write.
        weights: A factor for each adapter, in their order, as in --weights 0.7 0.3. [default: 1 for each]
        recipe: How they are combined.
        base: The model that all were trained on, if some do not say so by a hash, as adapters that PEFT wrote.
        overwrite: Replace the output if it is an adapter.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    combined = combine(adapters, output, weights=weights, recipe=recipe, base=base, overwrite=overwrite)
    method = combined.recipe.method
    parts = {str(path): weight for path, weight in zip(adapters, combined.weights, strict=True)}
    off = f"{combined.distance:.2%}" if combined.distance > 1e-6 else "nothing but rounding"
    console.fields(
        f"{output}, by {method}",
        {
            **{path: f"times {weight:g}" for path, weight in parts.items()},
            "rank": combined.rank,
            "layers": len(combined.updates),
            "off the weighted sum of updates by": off,
        },
    )
    console.result({"output": output, "layers": len(combined.updates), **combined.provenance()})


def _base(facts: Mapping[str, Any]) -> str:
    name = os.path.basename(facts["base"]) or "not stated"
    digest = facts["base_sha256"]
    return f"{name} ({digest[:_HASH_SHOWN]})" if digest else name


def _method(facts: Mapping[str, Any]) -> str:
    return facts["method"] + (f" on {facts['quantize']}" if facts["quantize"] else "")


def _spread(values: Sequence[float]) -> str:
    """One value, or the smallest and the largest."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _row(layer: LayerDifference) -> tuple[str, ...]:
    numbers = (*layer.norms, layer.distance, layer.cosine)
    return (layer.layer, *("none" if number is None else f"{number:.4g}" for number in numbers))
