"""The table as a page: ``python -m tests.hostile.page > docs/hostile-input.md``."""

from __future__ import annotations

import sys

from tests.hostile.case import Case, Outcome
from tests.hostile.table import ALL_CASES

INTRODUCTION = """# Hostile and uneven input

Environments are written by many hands, and a network does what it likes. Each row below is a test: the input
travels over HTTP through the real client, and is read, validated and prepared; some of each kind go on into
the real training loop. What an *environment* or the *real API* does runs on the real Atropos API server; what
that server will not do on demand, a *server* that misbehaves does. A good batch follows each bad input, and
what is prepared for the steps, or the final weights, must equal, bit for bit, those of a run that saw the
good parts only.

There are four outcomes:

| outcome | rows | what it means |
|---|---|---|
"""

MEANINGS: dict[Outcome, str] = {
    "trained": "Used as it is, or as what it clearly means; or no batch of ours was touched.",
    "set aside": "Not trained on, kept under `<train.output_dir>/set_aside` with the reason; the rest of the "
    "batch is trained. A body that is no batch at all is kept whole (`batches_unreadable`).",
    "possibly lost": "The API removes a batch when it answers: whatever goes wrong then may have cost one. "
    "It is counted (`intake_possibly_lost`), and the run goes on.",
    "refused": "The run ends with an error that says what was found and what to do, and a checkpoint.",
}

REST = """
A batch with nothing to train on is kept whole, as `batch-NNNNNN.json`; single groups are lines of
`groups.jsonl`. The share of groups set aside over the last `train.set_aside_window` batches is in every
metrics row (`set_aside_share`). Past `train.set_aside_alarm` a warning names the share and the most frequent
reasons, and `set_aside_alarms_total` counts it; past `train.set_aside_limit` the run stops with a checkpoint.

`set_aside` itself takes at most `train.set_aside_max_bytes`; the oldest of it goes first, and
`set_aside_pruned_total` counts the files. The window survives a restart: it is in the checkpoint.

Replies are read up to `atropos.max_body_bytes`, on the wire and decompressed, and never held beyond it. Sizes
that try it (gzip bombs, endless bodies, deep nesting) also run in a process whose peak memory is measured.
Generated input is tested beside the table: mutated batches, damaged bytes, and groups made from the OpenAPI
schema of the real API, pushed to it and fetched from it.

## The table

| input | what is sent | by | outcome |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    meanings = "".join(
        f"| {outcome} | {sum(case.outcome == outcome for case in ALL_CASES)} | {meaning} |\n"
        for outcome, meaning in MEANINGS.items()
    )
    return INTRODUCTION + meanings + REST + "".join(map(_row, ALL_CASES))


def _row(case: Case) -> str:
    names = " or ".join(f"`{error.__name__}`" for error in case.errors)
    outcome = f"refused: {names}" if names else case.outcome
    sent = case.sent.replace("|", "\\|").replace("<", "&lt;")
    return f"| {case.name} | {sent} | {case.origin} | {outcome} |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
