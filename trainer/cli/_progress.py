"""One line a step on the terminal."""

from __future__ import annotations

import contextlib

from schemas import count_of, printable
from trainer.cli._logging import LogConsole
from trainer.run.metrics import Row

_console = LogConsole()


def show_step(row: Row) -> None:
    """Print a metrics row as one line."""
    with contextlib.suppress(OSError):  # a log on a disk that is full, say: the metrics have the row
        _console.print(printable(format_row(row)), markup=False)


def format_row(row: Row) -> str:
    """The line for a row of metrics.jsonl."""
    if row["kind"] == "publish":
        return _format_publish(row)
    if row["kind"] == "skipped":
        return f"step {row['step']:>5}  batch {row['batch']} skipped: {row['reason']}"
    parts = [
        f"step {row['step']:>5}",
        f"reward {_number(row.get('reward_mean'), '.3f')}",
        f"loss {_number(row.get('loss'), '+.4f')}",
        f"grad {_number(row.get('grad_norm'), '.2f')}",
        f"kl {_number(row.get('mismatch_kl'), '.4f')}",
        f"{_number(row.get('tokens_per_second'), '.0f')} tok/s",
        f"wait {_number(row.get('waiting_seconds'), '.1f')}s",
        f"train {_number(row.get('training_seconds'), '.1f')}s",
    ]
    if row.get("set_aside_groups"):
        parts.append(f"{count_of(row['set_aside_groups'], 'group')} set aside")
    return "  ".join(parts)


def _format_publish(row: Row) -> str:
    verified = "verified" if row["publish_verified"] else "not verified"
    if row["publish_already_served"]:
        return f"version {row['version']:>2}  served already, {verified}"
    return "  ".join(
        [
            f"version {row['version']:>2}  published in {_number(row['publish_seconds'], '.1f')}s",
            f"training waited {_number(row['publish_capture_seconds'], '.2f')}s",
            f"generation {_number(row['publish_pause_seconds'], '.2f')}s",
            verified,
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
