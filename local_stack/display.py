"""The live view of a run: a panel on a terminal, one line per event anywhere else."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from local_stack.curve import curve
from local_stack.records import PublishRow, StepRow
from local_stack.state import RunState

_CURVE_WIDTH = 40
_REDRAW_SECONDS = 0.5
_SERVICE_STYLES = {
    "starting": ("○", "yellow"),
    "ready": ("●", "green"),
    "stopping": ("○", "yellow"),
    "stopped": ("·", "dim"),
}


class Display(Protocol):
    """Shows a run; entered while it goes on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, state: RunState, *, final: bool = False) -> None:
        """Show `state`; called about ten times a second, and once more with `final` at the end."""


def make_display(console: Console) -> Display:
    """Return the panel if `console` is a terminal, else the lines."""
    return PanelDisplay(console) if console.is_terminal else LineDisplay(console)


class PanelDisplay:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._drawn_at = -math.inf
        # Drawn only from update(): a refresh thread would draw between a signal and its handling.
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, state: RunState, *, final: bool = False) -> None:
        """Redraw the panel, at most every half second: the processor is wanted for other things."""
        now = time.monotonic()
        if final or now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            self._live.update(draw_panel(state), refresh=True)


class LineDisplay:
    """One line for each new phase, finished evaluation, step and publish; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._steps_shown = 0
        self._publishes_shown = 0
        self._evaluation_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, state: RunState, *, final: bool = False) -> None:
        """Print what is new."""
        if state.phase != self._phase:
            self._phase = state.phase
            self._say(state, state.phase)
        if state.heldout_before is not None and not self._evaluation_shown:
            self._evaluation_shown = True
            self._say(state, f"held-out score before training: {state.heldout_before:.1%}")
        for row in state.rows[self._steps_shown :]:
            self._say(state, describe_step(row, state.steps))
        self._steps_shown = len(state.rows)
        for publish in state.publishes[self._publishes_shown :]:
            self._say(state, describe_publish(publish))
        self._publishes_shown = len(state.publishes)

    def _say(self, state: RunState, text: str) -> None:
        self._console.print(f"[{state.seconds:5.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)


def describe_step(row: StepRow, steps: int) -> str:
    """Put one step into one line, e.g. `step 3/30  reward 0.412  loss +0.0123  210 tokens/s  ...`."""
    parts = [f"step {row.step}/{steps}"]
    if row.reward_mean is not None:
        parts.append(f"reward {row.reward_mean:.3f}")
    if row.loss is not None:
        parts.append(f"loss {row.loss:+.4f}")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:.0f} tokens/s")
    return "  ".join(parts)


def describe_publish(row: PublishRow) -> str:
    """Put one publish into one line, e.g. `version 3 published in 1.8 s  paused 0.6 s  verified`."""
    proof = "verified" if row.publish_verified else "NOT VERIFIED"
    return (
        f"version {row.version} published in {row.publish_seconds:.1f} s"
        f"  paused {row.publish_pause_seconds:.1f} s  {proof}"
    )


def draw_panel(state: RunState) -> RenderableType:
    """Draw the whole panel."""
    heading = Table.grid(expand=True)
    heading.add_column(ratio=1)
    heading.add_column(justify="right")
    heading.add_row(_services(state), Text(f"seed {state.seed}", style="dim"))
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", min_width=9)
    body.add_column()
    for label, value in _values(state):
        body.add_row(label, value)
    return Panel(
        Group(heading, Text(), _progress(state), Text(), body),
        title=f"[bold]atropos-trainer[/] · {state.model}",
        subtitle=f"[dim]{state.run_dir}[/]",
        title_align="left",
        subtitle_align="right",
        border_style="cyan",
        padding=(1, 2),
        width=88,
    )


def _services(state: RunState) -> Text:
    line = Text()
    for name, status in state.services.items():
        symbol, style = _SERVICE_STYLES[status]
        line.append(f"{symbol} ", style=style).append(f"{name}   ")
    return line


def _progress(state: RunState) -> RenderableType:
    clock = _clock(state.seconds)
    if state.seconds_left is not None and state.steps_done < state.steps:
        clock += f", about {_clock(state.seconds_left)} left"
    row = Table.grid(padding=(0, 2))
    row.add_row(
        Text(state.phase, style="bold"),
        ProgressBar(total=max(1, state.steps), completed=state.steps_done, width=24),
        f"{state.steps_done}/{state.steps}",
        Text(clock, style="dim"),
    )
    return row


def _values(state: RunState) -> list[tuple[str, RenderableType]]:
    values: list[tuple[str, RenderableType]] = []
    if state.heldout_before is not None:
        values.append(("held-out", f"{state.heldout_before:.1%} before training"))
    rewards = [row.reward_mean for row in state.rows if row.reward_mean is not None]
    if rewards:
        line = Text(f"{rewards[-1]:.3f}  ", style="bold").append(
            curve(rewards, width=_CURVE_WIDTH), style="green"
        )
        values.append(("reward", line))
    if state.rows:
        last = state.rows[-1]
        if last.loss is not None:
            values.append(("loss", f"{last.loss:+.4f}"))
        if last.tokens_per_second is not None:
            values.append(("training", f"{last.tokens_per_second:,.0f} tokens/s"))
    if state.publishes_made:
        values.append(("published", _publishing(state)))
    return values


def _publishing(state: RunState) -> Text:
    last = state.publishes[-1]
    text = Text(
        f"version {last.version} in {last.publish_seconds:.1f} s, paused {last.publish_pause_seconds:.1f} s"
    )
    proven = state.publishes_verified == state.publishes_made
    return text.append(
        f"  {'✓' if proven else '✗'} {state.publishes_verified} of {state.publishes_made} proven served",
        style="green" if proven else "bold red",
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
