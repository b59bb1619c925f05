"""Exports the journal as JSON lines, for other programs."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from atropos_client.errors import JournalDamaged
from atropos_client.journal._journal import Journal

ExportForm = Literal["batches", "groups"]
"""One line a batch with what the ledger says of it, or one line a group as environments write them."""


def export_batches(
    journal: Journal, numbers: Iterable[int], *, form: ExportForm = "batches"
) -> Iterator[str]:
    """Iterate over lines of JSON, without line ends.

    Args:
        journal: Opened for reading or writing.
        numbers: Which batches.
        form: "batches": the ledger's fields and `reply`, what the API sent (null: pruned), or `body_base64`
            where that is not JSON, or `damaged` with what is wrong. "groups": only the groups of batches
            that can be read.
    """
    for number in numbers:
        line = _batch_line(journal, number)
        if form == "batches":
            yield json.dumps(line)
        elif isinstance(line.get("reply"), dict):
            yield from (json.dumps(group) for group in line["reply"].get("batch") or [])


def _batch_line(journal: Journal, number: int) -> dict[str, Any]:
    entry = journal.entry(number)
    fields = dataclasses.asdict(entry)
    del fields["stored_size"]
    if entry.stored_size is None:
        return {**fields, "reply": None}
    try:
        body = journal.read(number).body
    except JournalDamaged as error:
        return {**fields, "damaged": str(error)}
    try:
        return {**fields, "reply": json.loads(body)}
    except ValueError:
        return {**fields, "body_base64": base64.b64encode(body).decode("ascii")}
