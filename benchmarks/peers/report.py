"""The table and the figure of a comparison, from what was measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from measuring import WARM_UP

PEER = "TRL + PEFT"
Results = dict[str, Any]


def tokens_per_second(measured: list[dict[str, Any]]) -> float:
    """Median over the steps of some measurements, those for warm-up left out."""
    return statistics.median(
        tokens / seconds
        for one in measured
        for tokens, seconds in list(zip(one["tokens"], one["seconds"], strict=True))[WARM_UP:]
    )


def table(results: Results) -> str:
    """Ratios first, then what they come from, in Markdown."""
    sets = list(dict.fromkeys(one["set"] for one in results["measured"]))
    lines = [
        "| | tokens/s | times TRL's | share of the matrix rate | peak memory, GB | share of TRL's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in sets:
        peer = of(results, name, PEER)
        for contender in contenders(results):
            own = of(results, name, contender)
            rate, peak = tokens_per_second(own), peak_bytes(own)
            lines.append(
                f"| {name}: {contender} | {rate:.0f} | {rate / tokens_per_second(peer):.2f} "
                f"| {share_of_limit(results, name, contender):.0%} "
                f"| {peak / 1e9:.2f} | 1/{peak_bytes(peer) / peak:.1f} |"
            )
    for name in sets:
        ratio = tokens_per_second(of(results, name, "QA-LoRA")) / tokens_per_second(of(results, name, "LoRA, packed"))
        lines += ["", f"QA-LoRA against LoRA on the same packed file, {name}: {ratio:.2f} times."]
    losses = results["loss_of_first_step_in_fp32"]
    theirs, ours = losses[PEER], losses["LoRA"]
    lines += [
        "",
        f"Bf16 matrix products: {matrix_rate(results) / 1e9:,.0f} GFLOP/s.",
        "",
        "From the command to the first optimiser step, QA-LoRA on the packed file, without the evaluation before it: "
        f"{statistics.median(results['seconds_to_first_step']):.1f} s.",
        "",
        f"Loss of a first step in fp32: {ours:.6f}, TRL's {theirs:.6f}, {abs(ours / theirs - 1):.1e} apart.",
        "",
        f"In bf16 the losses of first steps differ by at most {first_losses_apart(results):.4f}.",
    ]
    return "\n".join(lines) + "\n"


def figure(results: Results, path: Path) -> None:
    """Bars of throughput and of peak memory, a group for each set of rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(one["set"] for one in results["measured"]))
    names = contenders(results)
    figures, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    quantities = [
        ("tokens/s (more is better)", tokens_per_second),
        ("peak resident memory, GB (less is better)", lambda measured: peak_bytes(measured) / 1e9),
    ]
    for axis, (title, quantity) in zip(axes, quantities, strict=True):
        for i, contender in enumerate(names):
            heights = [quantity(of(results, name, contender)) for name in sets]
            places = [group + (i - (len(names) - 1) / 2) / (len(names) + 1) for group in range(len(sets))]
            bars = axis.bar(places, heights, width=1 / (len(names) + 1), label=contender)
            axis.bar_label(bars, fmt=lambda height: f"{height:.3g}", fontsize=8)
        axis.set_title(title)
        axis.set_xticks(range(len(sets)), sets)
    figures.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figures.suptitle(
        f"SmolLM2-135M, rank 16, 8 documents a step, {results['machine']['cores']} cores, {results['date']}"
    )
    figures.savefig(path, dpi=150)


def contenders(results: Results) -> list[str]:
    """Their names, in the order of measurement."""
    return list(dict.fromkeys(one["contender"] for one in results["measured"]))


def of(results: Results, name: str, contender: str) -> list[dict[str, Any]]:
    """The measurements of one contender on one set of rows."""
    return [one for one in results["measured"] if (one["set"], one["contender"]) == (name, contender)]


def peak_bytes(measured: list[dict[str, Any]]) -> int:
    """The highest of several measurements."""
    return max(one["peak_bytes"] for one in measured)


def matrix_rate(results: Results) -> float:
    """FLOP/s of large products: the median over all processes that measured it."""
    rates = [one["matrix_flops_per_second"] for one in results["measured"] if "matrix_flops_per_second" in one]
    return statistics.median(rates)


def share_of_limit(results: Results, name: str, contender: str) -> float:
    """The least work of a step (4 FLOP for each frozen weight and token) at the machine's rate, over its time."""
    # TRL does the same work on the same steps; lorafit counts it.
    counted = of(results, name, "LoRA")
    return statistics.median(
        flops / seconds / matrix_rate(results)
        for own, count in zip(of(results, name, contender), counted, strict=True)
        for flops, seconds in list(zip(count["flops"], own["seconds"], strict=True))[WARM_UP:]
    )


def first_losses_apart(results: Results) -> float:
    """The largest difference between the first losses of a round and a set, over the same base in bf16."""
    first = {(one["round"], one["set"], one["contender"]): one["losses"][0] for one in results["measured"]}
    return max(abs(first[turn, name, "LoRA"] - loss) for (turn, name, who), loss in first.items() if who == PEER)
