"""A run as cells of text, and as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.step._summary import MOST_DISTURBANCE, Summary, bars_of, disturbance_of, summarize
from benchmarks.step._work import PRIME_RL

__all__ = ["COLUMNS", "cells", "describe_counts", "show", "throughput_lines"]

COLUMNS = (
    "",
    "seconds",
    "trained tokens/s",
    "computed tokens",
    "peak GiB",
    "x ours",
    "x floor",
    "gradients differ",
)


def cells(summary: Summary) -> list[str]:
    """One text a column."""
    if summary.seconds is None:
        difference = _number(summary.gradient_difference, "{:.1e}")
        return [summary.label, summary.status, *[""] * (len(COLUMNS) - 3), difference]
    return [
        summary.label,
        f"{summary.seconds:.2f}" if summary.seconds >= 1 else f"{summary.seconds:.4f}",
        _number(summary.trained_tokens_per_second, "{:,.0f}"),
        _number(summary.computed_tokens, "{:,}"),
        _number(summary.peak_gib, "{:.2f}", missing="n/a"),
        _number(summary.times_ours, "{:.2f}"),
        _number(summary.times_floor, "{:.2f}"),
        _number(summary.gradient_difference, "{:.1e}"),
    ]


def describe_counts(counts: dict[str, int]) -> str:
    """Contents of the batch."""
    return (
        f"{counts['sequences']} sequences in {counts['groups']} groups; tokens: "
        f"{counts['sequence_tokens']:,} in all, {counts['unique_tokens']:,} unique, "
        f"{counts['trained_tokens']:,} trained"
    )


def show(console: Console, run: dict[str, Any]) -> None:
    """Print a run: its table, its bars, and its throughput where that was asked for."""
    table = Table(title=f"{run['case']}: {run['title']}, {run['dtype']}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for summary in summarize(run):
        table.add_row(*cells(summary))
    console.print(table)
    console.print(describe_counts(run["counts"]))
    disturbance = disturbance_of(run)
    if disturbance > MOST_DISTURBANCE:
        console.print(
            f"[red]DISTURBED[/] other processes took up to {disturbance:.0%} of the cores meanwhile"
        )
    for bar in bars_of(run):
        console.print(
            f"[{'green' if bar.met else 'red'}]{'met    ' if bar.met else 'NOT MET'}[/] "
            f"{bar.text}: {bar.found}"
        )
    for line in throughput_lines(run):
        console.print(line)
    console.print()


def throughput_lines(run: dict[str, Any]) -> list[str]:
    """Tokens per second and MFU of our step, beside what prime-rl published."""
    if not run["optimizer_step"]:
        return []
    ours = next((summary for summary in summarize(run) if summary.name.startswith("ours")), None)
    if ours is None or ours.seconds is None:
        return []
    counts, peak = run["counts"], run["peak_flops"]
    mfu = f"{run['step_flop'] / ours.seconds / peak:.1%} MFU" if peak else "MFU n/a (give --peak-tflops)"
    return [
        f"tokens/s, prefix sharing not counted: {counts['unique_tokens'] / ours.seconds:,.0f}",
        f"tokens/s, every sequence in full:     {counts['sequence_tokens'] / ours.seconds:,.0f}",
        (
            f"{mfu} at {run['step_flop'] / 1e12:.3g} TFLOP a step; "
            f"{_number(ours.peak_total_gib, '{:.1f}', missing='n/a')} GiB in all"
        ),
        (
            f"prime-rl, published (Qwen3-0.6B, one H100): {PRIME_RL['tokens_per_second']:,.0f} tokens/s, "
            f"{PRIME_RL['mfu']:.1%} MFU, {PRIME_RL['peak_gib']} GiB"
        ),
    ]


def _number(value: float | None, form: str, *, missing: str = "") -> str:
    return missing if value is None else form.format(value)
