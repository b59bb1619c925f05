"""Draws the overview of a run in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from schemas import count_of, printable
from trainer.view.run_reader import RunReader

_BARS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 36
_CURVES: Final = (
    ("reward_mean", "reward"),
    ("loss", "loss"),
    ("mismatch_kl", "mismatch KL"),
    ("entropy", "entropy"),
    ("grad_norm", "gradient"),
    ("staleness", "staleness"),
    ("tokens_per_second", "tokens/s"),
    ("set_aside_share", "set aside"),
)
_PARTS: Final = (
    ("training_seconds", "training", "blue"),
    ("publishing_seconds", "publishing", "cyan"),
    ("waiting_seconds", "waiting", "yellow"),
)


def draw_overview(reader: RunReader) -> RenderableType:
    """The state, the curves as rows of bars, the time of the newest step, and what was not trained on."""
    state = reader.state()
    curves = reader.curves("step", [name for name, _ in _CURVES], points=_WIDTH)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True, style="blue")
    table.add_column(no_wrap=True, justify="right")
    for name, label in _CURVES:
        column = curves["columns"].get(name)
        if column is not None:
            newest = next((value for value in reversed(column["mean"]) if value is not None), None)
            table.add_row(label, spark(column["mean"]), "-" if newest is None else f"{newest:.4g}")
    parts: list[RenderableType] = [_status(state)]
    if state["steps"]:
        bar = ProgressBar(total=state["steps"], completed=state["newest"].get("step", 0), width=60)
        parts.append(Padding(bar, 0))  # a bar alone does not end its line
    parts += [Panel(table, title="curves", title_align="left", expand=False)] if table.row_count else []
    parts.append(Columns([_time(state["newest"]), _publish(state["publish"]), _set_aside(state)]))
    return Group(*parts)


def spark(values: Sequence[float | None]) -> str:
    """One character a value, by where it lies between lowest and highest; blank where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    top = len(_BARS) - 1
    return "".join(" " if value is None else _BARS[round((value - low) / span * top)] for value in values)


def _status(state: dict[str, Any]) -> Text:
    health, newest = state["health"], state["newest"]
    text = Text(printable(state["name"]), style="bold")
    text.append(f"  step {newest.get('step', 0)}" + (f" of {state['steps']}" if state["steps"] else ""))
    if health is None:
        return text.append("  says nothing of itself (no health.json)", style="yellow")
    if health.get("status") == "ended":
        return text.append("  ended", style="dim")
    if health["is_gone"]:
        return text.append(f"  gone: nothing heard for {health['age_seconds']:.0f} s", style="red")
    style = "red" if health.get("status") == "overdue" else "green"
    text.append(f"  {printable(str(health.get('phase')))}", style=style)
    text.append(f", waiting for {printable(str(health.get('waiting_for')))}", style="dim")
    for rank, seconds in dict(health.get("silent_processes") or {}).items():
        text.append(f"  rank {printable(str(rank))} silent for {seconds} s", style="red")
    return text


def _time(newest: dict[str, Any]) -> Panel:
    seconds = {label: newest.get(name) or 0.0 for name, label, _ in _PARTS}
    total = sum(seconds.values()) or 1.0
    bar = Text()
    for _, label, style in _PARTS:
        bar.append("█" * round(20 * seconds[label] / total), style=style)
    lines = [f"{label} {value:.1f} s" for label, value in seconds.items()]
    return Panel(Group(bar, *lines), title="newest step", title_align="left", expand=False)


def _publish(publish: dict[str, Any]) -> Panel:
    if not publish:
        return Panel("nothing yet", title="publish", title_align="left", expand=False)
    proven = "proven" if publish.get("publish_verified") else "not proven"
    lines = [f"version {publish.get('version')}, {proven}"]
    for name, label in (("publish_mean_difference", "mean difference"), ("publish_seconds", "seconds")):
        if isinstance(publish.get(name), int | float):
            lines.append(f"{label} {publish[name]:.3g}")
    return Panel(printable("\n".join(lines), lines=True), title="publish", title_align="left", expand=False)


def _set_aside(state: dict[str, Any]) -> Panel:
    lines = [f"{count} {outcome.replace('_', ' ')}" for outcome, count in state["batches"].items()]
    lines += [f"{count_of(count, 'group')}: {reason}" for reason, count in list(state["reasons"].items())[:4]]
    text = Text(printable("\n".join(lines) or "no journal is here", lines=True))
    return Panel(text, title="batches", title_align="left", expand=False)
