"""`atropos-train journal show`: what is in a batch, and what of it was trained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atropos_client import parse_batch
from atropos_client.errors import InvalidReply
from atropos_client.journal import Journal
from schemas import IGNORE_INDEX, ScoredGroup
from trainer.cli._logging import escape
from trainer.errors import CheckpointError

OUTCOME_COLORS = {"received": "yellow", "trained": "green", "set_aside": "red", "skipped": "magenta"}

Decode = Callable[[list[int]], str]


def show_batches(journal: Journal, args: argparse.Namespace) -> int:
    """Print what is in each batch, group by group, and which groups were set aside."""
    console = Console(highlight=False)
    decode = None if args.text is None else _decoder(args.text, journal.directory.parent)
    for number in args.numbers or journal.numbers_after(0):
        entry = journal.entry(number)
        version = "unknown" if entry.served_version < 0 else str(entry.served_version)
        step = "" if entry.step is None else f" at step {entry.step}"
        reason = f": {escape(entry.reason)}" if entry.reason else ""
        console.print(
            f"[bold]batch {number}[/]  {format_time(entry.received_at)}  served version {version}  "
            f"{entry.size:,} bytes  sha256 {entry.sha256}\n"
            f"  [{OUTCOME_COLORS[entry.outcome]}]{entry.outcome}[/]{step}{reason}",
            soft_wrap=True,
        )
        if entry.stored_size is None:
            console.print("  the body was pruned: it lies behind the oldest checkpoint that is kept")
            continue
        set_aside = {} if entry.outcome == "received" else _set_aside_groups(journal.directory, number)
        _show_groups(console, journal.read(number).body, set_aside, decode)
    return 0


def format_time(seconds: float) -> str:
    """A moment in UTC."""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _show_groups(console: Console, body: bytes, set_aside: dict[int, str], decode: Decode | None) -> None:
    try:
        reply = parse_batch(body)
    except InvalidReply as error:
        console.print(f"  unreadable: {escape(str(error))}", soft_wrap=True)
        return
    reasons = {rejected.index: rejected.reason for rejected in reply.rejected}
    places = [place for place in range(len(reply.batch or [])) if place not in reasons]
    reasons |= set_aside
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 2))
    for heading in ("group", "environment", "sequences", "tokens", "trained", "scores"):
        table.add_column(heading, justify="left" if heading == "scores" else "right")
    for place, group in zip(places, reply.groups, strict=True):
        scores = ", ".join(f"{score:g}" for score in group.scores[:8])
        table.add_row(
            str(place),
            str(group.env_id),
            str(group.sequence_count),
            f"{group.token_count:,}",
            "set aside" if place in reasons else f"{group.trained_token_count:,}",
            scores + (", ..." if len(group.scores) > 8 else ""),
        )
    console.print(table)
    for place, reason in sorted(reasons.items()):
        console.print(f"  [red]group {place} was set aside[/]: {escape(reason)}", soft_wrap=True)
    if decode is not None:
        for place, group in zip(places, reply.groups, strict=True):
            _show_texts(console, place, group, decode)


def _show_texts(console: Console, place: int, group: ScoredGroup, decode: Decode) -> None:
    for index, (tokens, masks) in enumerate(zip(group.tokens, group.masks, strict=True)):
        console.print(f"  [bold]group {place} sequence {index}[/]  score {group.scores[index]:g}")
        pieces = [escape(decode(span)) for span in _spans(tokens, masks)]
        # Spans alternate; the first is a prompt unless the first token is trained.
        first = int(masks[0] == IGNORE_INDEX)
        marked = [piece if (number + first) % 2 else f"⟦{piece}⟧" for number, piece in enumerate(pieces)]
        console.print("    " + "".join(marked), soft_wrap=True)


def _spans(tokens: list[int], masks: list[int]) -> Iterator[list[int]]:
    """The tokens, cut where being trained begins or ends."""
    paired = zip(tokens, masks, strict=True)
    for _, span in groupby(paired, lambda pair: pair[1] == IGNORE_INDEX):
        yield [token for token, _ in span]


def _set_aside_groups(journal: Path, number: int) -> dict[int, str]:
    """Reasons of the groups that the run set aside of a batch (`trainer.samples.quarantine`), by place."""
    reasons: dict[int, str] = {}
    for path in sorted((journal.parent / "set_aside").glob("groups*.jsonl")):
        with path.open("rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                    if line["batch"] == number:
                        reasons[line["group_index"]] = str(line["reason"])
                except (ValueError, LookupError, TypeError):
                    continue  # cut off when the process died, or changed by hand
    return reasons


def _decoder(tokenizer: str, output: Path) -> Decode:
    """Decode with a tokenizer of this machine, or with that of the hub which the run in `output` has."""
    from trainer.model.tokenizer import load_tokenizer

    loaded = load_tokenizer("--text", tokenizer, ask_hub=tokenizer in _models_of(output))
    return lambda tokens: str(loaded.decode(tokens))


def _models_of(output: Path) -> list[str]:
    """Reads from the run's newest checkpoint where its model and its tokenizer are."""
    from trainer.checkpoints.manifest import read_manifest
    from trainer.checkpoints.retention import list_checkpoints

    try:
        newest = list_checkpoints(output / "checkpoints")[-1]
        model = read_manifest(newest).configuration["model"]
    except (CheckpointError, LookupError):
        return []
    return [model["path"], model["tokenizer_path"]]
