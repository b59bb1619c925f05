"""Files of JSON lines that a resumed run goes on writing: `metrics.jsonl` and `set_aside/groups*.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from atropos_client.private_files import open_private, replace_private
from schemas import count_of

LOGPROBS_FILE: Final = "token_logprobs.jsonl"
"""Name of the file of the trainer's own log-probs, in a run's output directory."""

logger = logging.getLogger(__name__)


def drop_rows(path: Path, is_dropped: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a file without some of its rows; nobody needs these files, so nothing in them ends a run.

    A last line that was cut off is dropped. A line that is no row is moved to `<name>.unreadable`.

    Args:
        path: The file; need not be there.
        is_dropped: Whether to drop a row. What it raises says that the line is no row.

    Returns:
        How many rows were dropped.
    """
    if not path.is_file():
        return 0
    *lines, cut_off = path.read_bytes().split(b"\n")
    kept, unreadable, dropped = [], [], 0
    for line in lines:
        try:
            is_row = not is_dropped(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            unreadable.append(line)
            continue
        dropped += not is_row
        kept += [line] if is_row else []
    if unreadable:
        aside = path.with_name(f"{path.name}.unreadable")
        with open_private(aside, "ab") as file:
            file.writelines(line + b"\n" for line in unreadable)
        logger.warning("%s: moved %s, no rows, to %s", path, count_of(len(unreadable), "line"), aside)
    if len(kept) < len(lines) or cut_off:
        replace_private(path, b"".join(line + b"\n" for line in kept))
    return dropped + bool(cut_off)
